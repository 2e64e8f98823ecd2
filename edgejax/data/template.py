"""Chat templates: the Jinja text that a model ships, rendered in a sandbox, the same bits every day.

Hugging Face's ``apply_chat_template`` is what the templates were written for, so the environment offers what
that one does: block trimming, ``break``/``continue``, ``raise_exception``, ``tojson`` without HTML escapes,
``{% generation %}`` (passed through) and ``strftime_now``. One deviation: ``strftime_now`` tells a fixed day
unless the caller gives one, for a template that writes today's date into the prompt would otherwise make
yesterday's training data different from today's.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from edgejax.core.errors import DataError

# The day that Llama 3.x's template falls back to by itself; any fixed day would do.
FIXED_DATE = datetime.date(2024, 7, 26)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` renders its body: the marks are for trainers that need them."""

    tags = {"generation"}  # noqa: RUF012 (the attribute that Jinja reads)

    def parse(self, parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, str] | None = None,
    today: datetime.date = FIXED_DATE,
) -> str:
    """The text of a conversation.

    Args:
      template: Jinja source.
      messages: ``{"role": ..., "content": ...}`` each; passed to the template as they are.
      add_generation_prompt: end with the header of an assistant turn that is still to be written.
      variables: further names the template sees, like ``bos_token``.
      today: what ``strftime_now`` formats.

    Raises:
      DataError: the template does not parse, or refuses these messages.

    Example:
      >>> render_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}",
      ...                 [{"role": "user", "content": "Hi"}], add_generation_prompt=False)
      '[user] Hi\\n'
    """
    try:
        return _compile(template).render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=add_generation_prompt,
            strftime_now=today.strftime,
            **(variables or {}),
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template does not parse, line {error.lineno}: {error.message}") from error
    # TypeError and its kin: what template expressions raise on values they were not written for.
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        roles = [str(m.get("role")) for m in messages]
        raise DataError(
            f"the chat template refuses a conversation with the roles {roles}: {error}"
        ) from error
