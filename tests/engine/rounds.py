"""Small rounds for the engine's tests."""

from tokendance_jax.prompt import AgentPrompt, Round, Sampling, Segment

SHARED = (
    Segment("shared", "out/a", text="Edda mends the long net by the old quay.\n"),
    Segment("shared", "out/b", text="Tomas counts the barrels, then counts them again.\n"),
)


def agent(name, *, persona="", shared=SHARED, task="What do you do now?\n", limit=None):
    segments = (
        Segment("system", f"sys/{name}", text=f"You are {name}. {persona}\n"),
        *shared,
        Segment("task", f"task/{name}", text=task),
    )
    return AgentPrompt(name, segments, max_new_tokens=limit)


def three(**sampling):
    """Three agents with personas of different lengths."""
    agents = (
        agent("Edda", persona="You mend nets. " * 5),
        agent("Tomas", persona="You keep the store. " * 11),
        agent("Ines", persona="You pilot ships through the sound at night. " * 2),
    )
    return Round(agents, max_new_tokens=12, sampling=Sampling(**sampling))
