"""The text that a model sees of a request: its prompt as it is, or its messages through the chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helm.common.request import Request

from engine.errors import UnsupportedError
from flexgen_helm.helm.tokenizer import sha256_of

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer


class Rendering:
    """Renders for one deployment; `apply_chat_template` None applies one where the tokenizer has one."""

    def __init__(self, tokenizer: WrappedPreTrainedTokenizer, *, model: str, apply_chat_template: bool | None) -> None:
        self._tokenizer = tokenizer
        self._model = model
        with tokenizer as hf_tokenizer:
            chat_template = hf_tokenizer.chat_template
        self._applies_chat_template = bool(chat_template) if apply_chat_template is None else apply_chat_template
        self.digest = sha256_of(chat_template) if self._applies_chat_template else None
        """Of the template that is applied; None where none is."""

    def text(self, request: Request) -> str:
        """The text that the model will see."""
        _refuse_what_is_not_text(request)
        if not self._applies_chat_template:
            if request.messages:
                raise UnsupportedError(
                    f"the request has messages, but {self._model} is run without a chat template; "
                    "set apply_chat_template: true if it is a chat model"
                )
            return request.prompt
        messages = request.messages or [{"role": "user", "content": request.prompt}]
        try:
            with self._tokenizer as tokenizer:
                return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(
                f"the chat template of {self._model} refuses the request: {reason}; set apply_chat_template: false "
                "if it is no chat model"
            ) from None


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
