r"""Prompts from one string, in which the separator `<TTSEP>` marks the borders of shared blocks.

To write a literal separator inside a piece, put a backslash after its first character: `<\TTSEP>`,
like `<\/script>` in HTML. Each further backslash there stands for one backslash. The escape is
inside the separator, so a backslash right before a separator never escapes it.
"""

import hashlib
import re

from tokendance_jax.prompt.round import AgentPrompt, PromptError, Segment, check_text

SEPARATOR = "<TTSEP>"


def split_prompt(agent: str, text: str, separator: str = SEPARATOR) -> AgentPrompt:
    """Splits one string into an agent's segments.

    The last piece is the task, the first is private history, and the pieces between are shared. The
    first piece is history, not system, so that chat markup leaves it at the head of the user's turn
    and the model reads the string as it was written. A string without separators is a task only.

    Args:
      agent: name of the agent.
      text: the prompt.
      separator: the string between the pieces.

    Returns:
      The prompt. The id of a shared segment is a hash of its content, so equal blocks have equal
      ids.

    Raises:
      PromptError: an unsuitable separator, an empty task, NUL or lone surrogate.
    """
    check_text(text, f"agent {agent!r}: the prompt")
    escaped = _escaped(separator)
    pieces = [
        escaped.sub(lambda match: match[0].replace("\\", "", 1), piece)
        for piece in text.split(separator)
    ]
    *context, task = pieces
    segments = [_shared(piece) for piece in context]
    if context:
        segments[0] = Segment("history", f"{agent}/history", text=context[0])
    return AgentPrompt(agent, (*segments, Segment("task", f"{agent}/task", text=task)))


def escape(text: str, separator: str = SEPARATOR) -> str:
    """Escapes a piece so that `split_prompt` reads it back unchanged.

    Args:
      text: a piece that may contain the separator.
      separator: the string between the pieces.

    Returns:
      The piece with its separators escaped. Join such pieces with the separator to get a prompt.

    Raises:
      PromptError: an unsuitable separator.
    """
    return _escaped(separator, at_least=0).sub(lambda match: f"{match[0][0]}\\{match[0][1:]}", text)


def _escaped(separator: str, at_least: int = 1) -> re.Pattern[str]:
    """Matches the separator with `at_least` or more backslashes after its first character."""
    check_text(separator, "separator")
    borders = any(separator.startswith(separator[i:]) for i in range(1, len(separator)))
    # With a border, as in "--", the end of a piece could be read as the start of the separator.
    if len(separator) < 2 or "\\" in separator or borders:
        raise PromptError(
            f"separator {separator!r} is unfit; choose two or more characters without a backslash, "
            "whose end does not repeat the start"
        )
    return re.compile(rf"{re.escape(separator[0])}\\{{{at_least},}}{re.escape(separator[1:])}")


def _shared(text: str) -> Segment:
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Segment("shared", f"shared/{digest}", text=text)
