r"""Prompts from one string: the separator `<TTSEP>` marks where shared blocks begin and end.

A literal separator inside a piece is written with a backslash after its first character, as
`<\TTSEP>`, like `<\/script>` in HTML; one more backslash gives one more. The separator itself stays
whole in the text, so a backslash right before one is never taken for an escape.
"""

import hashlib
import re

from tokendance_jax.prompt.round import AgentPrompt, PromptError, Segment, check_text

SEPARATOR = "<TTSEP>"


def split_prompt(agent: str, text: str, separator: str = SEPARATOR) -> AgentPrompt:
    """Cuts one string into an agent's segments.

    The last piece is the task, the first one private history, and those between are shared. History
    and not system: in chat markup it stays at the head of the user's turn, so the model reads the
    string as it was written. A string without separators is a task and nothing else.

    Args:
      agent: name of the agent.
      text: the prompt.
      separator: what stands between the pieces.

    Returns:
      The prompt. Shared ids come from a hash of the content, so equal blocks have equal ids.

    Raises:
      PromptError: an unfit separator, an empty task, NUL or lone surrogate.
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
    """Writes a piece so that `split_prompt` reads it back unchanged.

    Args:
      text: a piece that may hold the separator.
      separator: what will stand between the pieces.

    Returns:
      The piece with its separators escaped; pieces joined by the separator make a prompt.

    Raises:
      PromptError: an unfit separator.
    """
    return _escaped(separator, at_least=0).sub(lambda match: f"{match[0][0]}\\{match[0][1:]}", text)


def _escaped(separator: str, at_least: int = 1) -> re.Pattern[str]:
    """Matches the separator with at least so many backslashes after its first character."""
    check_text(separator, "separator")
    borders = any(separator.startswith(separator[i:]) for i in range(1, len(separator)))
    # With a border, as in "--", the end of a piece could be read as the start of the separator.
    if len(separator) < 2 or "\\" in separator or borders:
        raise PromptError(
            f"separator {separator!r} is unfit; take two or more characters, no backslash, and an "
            "end that does not repeat the start"
        )
    return re.compile(rf"{re.escape(separator[0])}\\{{{at_least},}}{re.escape(separator[1:])}")


def _shared(text: str) -> Segment:
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Segment("shared", f"shared/{digest}", text=text)
