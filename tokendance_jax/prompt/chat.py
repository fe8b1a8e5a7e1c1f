"""Chat markup: what a model's template writes around and between an agent's segments.

A template is untrusted input, and it must not see the segments either: it renders random words in
their place, and what it wrote around these words is the markup. So no text of an agent is ever
parsed as markup, and the markup depends on nothing but the number of segments. The sandbox keeps a
template from the machine, not from wasting time: a nested loop may run for long.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Mapping
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tokendance_jax.prompt.round import PromptError

# A token's string, or those of a list such as `additional_special_tokens`.
SpecialToken = str | tuple[str, ...]


def chat_markup(
    template: str, system: int, user: int, special_tokens: Mapping[str, SpecialToken] | None = None
) -> tuple[str, ...]:
    """Finds the markup around the segments of one prompt.

    The prompt is a system message, if it has system segments (else the template does its default),
    one user turn of all other segments, and the opening of the assistant's answer. The template
    sees what it sees in transformers: `messages`, `add_generation_prompt`, `tools` and `documents`,
    which are None, and the special tokens by their names. Markup is rendered once in a process and
    kept, also where it shows the time.

    Args:
      template: source of the Jinja chat template.
      system: number of segments in the system message.
      user: number of segments in the user's turn, at least one.
      special_tokens: strings that the template writes by name, such as `bos_token`.

    Returns:
      `system + user + 1` strings: before the first segment, between each two, after the last.

    Raises:
      PromptError: the template fails, leaves the sandbox, or drops, repeats or reorders segments.
    """
    return _markup(template, system, user, tuple(sorted((special_tokens or {}).items())))


@functools.lru_cache(maxsize=64)
def _markup(
    template: str, system: int, user: int, special_tokens: tuple[tuple[str, SpecialToken], ...]
) -> tuple[str, ...]:
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
            .render(
                dict(special_tokens),
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
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
    """The sandbox with what transformers offers to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _tojson
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training, renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Takes the body as a scope of its own, as transformers does."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
