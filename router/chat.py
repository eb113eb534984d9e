"""Owns the rendering of chat messages to a prompt with the model's own template.

router/template_child.py makes one ChatTemplate for the model. A template is code that came with the
model, so it runs in jinja2's sandbox; a client chooses roles and contents, never the template.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template cannot be read, or makes no prompt of these messages; says why in one line."""


class _Refusal(TemplateError):
    """The template itself called raise_exception."""


class ChatTemplate:
    """A model's chat template. Renders what transformers' apply_chat_template would.

    The text names its special tokens itself: tokenize it without adding any.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except Exception as error:
            raise ChatTemplateError(f"the model's chat template: {_one_line(error)}") from error

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for (role, content) messages, up to where the model is to answer."""
        variables: dict[str, Any] = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(self._special_tokens | variables)
        except _Refusal as error:
            reason = " ".join(str(error).split())
            raise ChatTemplateError(f"the model's chat template refuses: {reason}") from error
        except Exception as error:  # a template can fail in any way that code can
            raise ChatTemplateError(
                f"the model's chat template fails: {_one_line(error)}"
            ) from error


class _Generation(Extension):
    """{% generation %} marks what the model wrote, for training; here it passes it through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which a prompt must not be."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
