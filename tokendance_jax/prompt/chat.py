"""Chat markup: what a model's template writes around and between an agent's segments.

A template is untrusted input, and it never sees the segments. It renders random words in their
place, and the text around these words is the markup. So an agent's text is never parsed as markup,
and the markup depends only on the number of segments. The sandbox protects the machine from a
template, but does not limit its running time: a nested loop may run for a long time.
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

# The string of one token, or the strings of a list such as `additional_special_tokens`.
SpecialToken = str | tuple[str, ...]


def chat_markup(
    template: str, system: int, user: int, special_tokens: Mapping[str, SpecialToken] | None = None
) -> tuple[str, ...]:
    """Finds the markup around the segments of one prompt.

    The prompt consists of a system message with the system segments, one user turn with all other
    segments, and the opening of the assistant's answer. Without system segments, the template
    writes its default system message, if it has one. The template sees the variables that
    transformers passes: `messages`, `add_generation_prompt`, `tools` and `documents` (both None),
    and the special tokens by name. Each markup is rendered once per process and cached, even if it
    shows the time.

    Args:
      template: source of the Jinja chat template.
      system: number of segments in the system message.
      user: number of segments in the user's turn, at least one.
      special_tokens: strings that the template writes by name, such as `bos_token`.

    Returns:
      `system + user + 1` strings: the markup before the first segment, between each two segments,
      and after the last.

    Raises:
      PromptError: the template fails, leaves the sandbox, or drops, repeats or reorders segments.
    """
    return _markup(template, system, user, tuple(sorted((special_tokens or {}).items())))


@functools.lru_cache(maxsize=64)
def _markup(
    template: str, system: int, user: int, special_tokens: tuple[tuple[str, SpecialToken], ...]
) -> tuple[str, ...]:
    # 128 random bits cannot occur in the template. Escaping filters leave letters and digits alone.
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
    """Returns a sandbox with the extensions that transformers offers to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    # Jinja's own tojson escapes for HTML.
    environment.filters["tojson"] = _tojson
    return environment


class _Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parses the body as a scope of its own, as transformers does."""
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
