"""Rendering a checkpoint's Jinja chat template. Free of torch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import BrokenCheckpoint, InvalidRequest

_ALLOWED = "messages that the model's chat template accepts"


class ChatTemplate:
    """A compiled chat template, in the sandbox and with the helpers that templates expect.

    Args:
        source: the template's text.
        variables: special tokens by name (`bos_token`, `eos_token`, …) that templates refer to.

    Raises:
        BrokenCheckpoint: the template does not compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as exc:
            raise BrokenCheckpoint("the chat template does not compile") from exc
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Text of the conversation.

        Raises:
            InvalidRequest: the template refuses the messages, such as roles that do not alternate.
        """
        try:
            return self._template.render(
                self._variables, messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt
            )
        except TemplateError as exc:
            raise InvalidRequest("messages", f"refused by the chat template: {exc.message}"[:256], _ALLOWED) from exc
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidRequest("messages", "the chat template cannot render them", _ALLOWED) from exc


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # jinja's own filter escapes HTML, which no prompt wants
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
