"""Chat markup: what a model's template writes around and between an agent's segments.

A template is untrusted input, and it must not see the segments either: it renders random words in
their place, and what it wrote around these words is the markup. So no text of an agent is ever
parsed as markup, and the markup depends on nothing but the number of segments. The sandbox keeps a
template from the machine, not from wasting time: a nested loop may run for long.
"""

import functools
import json
import re
import secrets
from typing import NoReturn

import jinja2
import jinja2.sandbox

from tokendance_jax.prompt.round import PromptError


@functools.lru_cache(maxsize=64)
def chat_markup(template: str, system: int, user: int) -> tuple[str, ...]:
    """Finds the markup around the segments of one prompt.

    The prompt is a system message, if it has system segments (else the template does its default),
    one user turn of all other segments, and the opening of the assistant's answer.

    Args:
      template: source of the Jinja chat template.
      system: number of segments in the system message.
      user: number of segments in the user's turn, at least one.

    Returns:
      `system + user + 1` strings: before the first segment, between each two, after the last.

    Raises:
      PromptError: the template fails, leaves the sandbox, or drops, repeats or reorders segments.
    """
    # 128 random bits cannot occur in the template; letters and digits survive filters that escape.
    secret = secrets.token_hex(16)
    words = [f"segment{secret}n{index}end" for index in range(system + user)]
    messages = [{"role": "user", "content": "".join(words[system:])}]
    if system:
        messages.insert(0, {"role": "system", "content": "".join(words[:system])})
    try:
        rendered = (
            _environment()
            .from_string(template)
            .render(messages=messages, add_generation_prompt=True)
        )
    except Exception as error:  # The template's own code may raise anything.
        raise PromptError(
            f"chat template failed: {type(error).__name__}: {error}; repair it or use raw prompts"
        ) from None
    markup = re.split(f"segment{secret}n([0-9]+)end", rendered)
    if markup[1::2] != [str(index) for index in range(system + user)]:
        raise PromptError(
            "chat template drops, repeats, changes or reorders the content of messages; "
            "repair it or use raw prompts"
        )
    return tuple(markup[::2])


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox with the helpers that templates of Hugging Face models expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _tojson
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
