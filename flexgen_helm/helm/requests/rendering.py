"""Renders the text that a model sees of a request: its prompt, or its messages through the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from helm.common.request import Request

from engine.errors import ConfigError, UnsupportedError
from engine.text.template import check_template_ends, names_in_template
from flexgen_helm.helm.requests.tokenizer import sha256_of

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer


_DATED = """{%- macro strftime_now(format) -%}
{%- set dated = namespace(text=format | replace("%%", "\x00")) -%}
{%- for directive, written in moment_written | items -%}
{%- set dated.text = dated.text | replace(directive, written) -%}
{%- endfor -%}
{{- dated.text | replace("\x00", "%") -}}
{%- endmacro %}
"""
"""Code before a template that writes the date of `moment_written` instead of today's: transformers gives templates the
clock and no way to set it. The line end is the one that transformers removes after a block.
"""
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuVFTDRehntkl" for flag in ("", "-")]


class Rendering:
    """Renders prompts for one deployment; `apply_chat_template` None applies a template where the tokenizer has one.

    A prompt that is only scored (`echo_prompt` and no tokens to generate) is a text whose log-probability is requested,
    not a user's message: it is not rendered.
    """

    def __init__(
        self,
        tokenizer: WrappedPreTrainedTokenizer,
        *,
        model: str,
        apply_chat_template: bool | None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._is_given = apply_chat_template is not None
        with tokenizer as hf_tokenizer:
            chat_template = hf_tokenizer.chat_template
            used = hf_tokenizer.get_chat_template() if chat_template else ""
        if apply_chat_template and not chat_template:
            raise ConfigError(
                f"apply_chat_template is true, but the tokenizer of {model} has no chat template; leave it out"
            )
        self.applies_template = bool(chat_template) if apply_chat_template is None else apply_chat_template
        """Whether prompts that are answered go through the chat template."""
        self.template = used if self.applies_template else ""
        """The chat template in use; empty if there is none."""
        self._variables = checked_variables(variables or {}, self.template, model)
        if self.applies_template:
            with tokenizer as hf_tokenizer:
                check_template_ends(hf_tokenizer, self._variables)
        self._digest = sha256_of(chat_template)
        self._dated = _DATED + used if "strftime_now" in used and self.applies_template else None
        self.moment = datetime.now()
        """The time that a template sees; it is fixed, so that a suite has only one date."""

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the date."""
        return self._dated is not None

    @property
    def note(self) -> str:
        """Whether the chat template is applied, and why, in one line."""
        why = "as apply_chat_template says" if self._is_given else "apply_chat_template is left out"
        if self.applies_template:
            why = why if self._is_given else f"the tokenizer has one and {why}"
            told = (
                f"the chat template of {self._model} is applied to prompts, but for those that are only scored ({why})"
            )
            if self._variables:
                told += "; it is given " + ", ".join(f"{name}={each!r}" for name, each in self._variables.items())
            return f"{told}; it writes {self.moment:%Y-%m-%d}, when the suite began" if self.writes_date else told
        why = why if self._is_given else f"the tokenizer has none and {why}"
        return f"no chat template is applied to the prompts of {self._model} ({why})"

    def text(self, request: Request) -> str:
        """The text that the model will see."""
        _refuse_what_is_not_text(request)
        if not self.applies_template and request.messages:
            raise UnsupportedError(
                f"the request has messages, but {self._model} is run without a chat template; "
                "set apply_chat_template: true if it is a chat model"
            )
        if not self.is_templated(request):
            return request.prompt
        messages = request.messages or [{"role": "user", "content": request.prompt}]
        try:
            with self._tokenizer as tokenizer:
                return str(
                    tokenizer.apply_chat_template(
                        messages,
                        tokenize=False,
                        add_generation_prompt=True,
                        **self._variables,
                        **self._date_of_suite(),
                    )
                )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(
                f"the chat template of {self._model} refuses the request: {reason}; set apply_chat_template: false "
                "if it is no chat model"
            ) from None

    def probe(self) -> str:
        """Render a prompt of one letter; the letter itself if the template refuses it."""
        try:
            return self.text(Request(prompt="a"))
        except UnsupportedError:
            return "a"

    def _date_of_suite(self) -> dict[str, Any]:
        if self._dated is None:
            return {}
        written = {directive: self.moment.strftime(directive) for directive in _DIRECTIVES}
        return {"chat_template": self._dated, "moment_written": written}

    def digest(self, request: Request) -> str | None:
        """The digest of the template that renders the request; None without one."""
        return self._digest if self.is_templated(request) else None

    def is_templated(self, request: Request) -> bool:
        """Whether the request's prompt goes through the chat template."""
        is_only_scored = request.echo_prompt and request.max_tokens == 0
        return self.applies_template and (bool(request.messages) or not is_only_scored)


def checked_variables(variables: Mapping[str, Any], template: str, model: str) -> dict[str, Any]:
    """Return the `chat_template_kwargs` of a deployment; `ConfigError` for those that its template does not use."""
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ConfigError(f"chat_template_kwargs {variables!r} of {model} are no names with values")
    if variables and not template:
        raise ConfigError(f"chat_template_kwargs of {model}: no chat template is applied; leave them out")
    known = names_in_template(template) - _GIVEN if variables else set()
    for name in variables:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"chat_template_kwargs: the chat template of {model} does not look at {name!r}{hint}")
    return dict(variables)


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
"""Names that templates always receive, or that are no arguments of a template."""


def _refuse_what_is_not_text(request: Request) -> None:
    asked = {
        "an embedding": request.embedding,
        "a multimodal prompt": request.multimodal_prompt,
        "an image": request.image_generation_parameters,
        "a response format": request.response_format,
    }
    for what, value in asked.items():
        if value:
            raise UnsupportedError(f"the request asks for {what}; flexgen_helm serves plain text requests only")
    if request.prompt and request.messages:
        raise UnsupportedError("the request has both prompt and messages; set one of them")
