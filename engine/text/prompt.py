"""Token ids of prompts, with one rule for the special tokens around a text. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.errors import JobError, UnsupportedError, named, without_panics
from engine.text.template import check_template_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
_MOST_CHARACTERS = 8_000_000
"""The most characters of one prompt: tokenizers take 200 bytes a character, and windows of a million tokens take
half as many."""
_MOST_PER_TOKEN = 32
"""The most characters of a prompt per token of the window: text has 3 to 5, and indented code and tables seldom 10."""
_ALWAYS_TOKENIZED = 100_000
"""The number of characters that are tokenized for any window: it takes no time, and gives the exact number of
tokens."""


@dataclass(frozen=True)
class PromptTokenizer:
    """Makes token ids of prompts.

    A chat template spells all special tokens itself, so nothing is added to its result. Any other text is preceded by
    the tokenizer's prefix (a BOS, or GLM's `[gMASK]<sop>`), unless the text itself begins with one of these tokens,
    white space aside. The tokenizer's suffix (an EOS) is left out, since the text continues.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]
    """The ids that the tokenizer puts before a text."""
    window: int | None = None
    """The most tokens of a prompt, as far as the model says; texts that are far longer are not tokenized."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, window: int | None = None) -> PromptTokenizer:
        """Create the one for a tokenizer; `UnsupportedError` if special tokens change how it splits the text itself."""
        whole, own = tokenizer.encode(_PROBE), tokenizer.encode(_PROBE, add_special_tokens=False)
        for at in range(len(whole) - len(own) + 1):
            if whole[at : at + len(own)] == own:
                return cls(tokenizer, tuple(whole[:at]), window)
        raise UnsupportedError(
            f"the tokenizer makes {whole} of {_PROBE!r} with special tokens and {own} without, so special tokens "
            "cannot be separated from the text; use a tokenizer that adds them only before and after a text"
        )

    def plain(self, text: str, room: int | None = None, own: Sequence[int] | None = None) -> list[int]:
        """The ids of a text that does not come from a template.

        `room`: where the prefix alone would make them longer than this, it is left out. `own`: the ids of the text
        without special tokens, if they are known.
        """
        own = self.rendered(text) if own is None else list(own)
        if self._begins_itself(own) or (room is not None and len(own) <= room < len(self.prefix) + len(own)):
            return own
        return [*self.prefix, *own]

    def rendered(self, text: str) -> list[int]:
        """The ids of a chat template's result, which spells all of them."""
        check_characters(len(text), self.window)
        try:
            with without_panics():
                return list(self.tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # of its files' patterns and of its library, with some texts only
            raise JobError(f"the prompt cannot be tokenized: {named(error)}") from None

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The ids of a conversation by the tokenizer's chat template, up to where the answer begins.

        `variables` are passed to the template. Raises what the template raises, and `CheckpointError` for one that does
        not end.
        """
        return self.rendered(self.chat_text(messages, **variables))

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of the conversation whose ids `chat` returns; raises what it raises."""
        conversation = [dict(message) for message in messages]
        characters = sum(len(str(message.get("content", ""))) for message in conversation)
        check_characters(characters, self.window)
        _ = self._ends
        written = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **variables
        )
        return str(written)

    @cached_property
    def _ends(self) -> None:
        """Check, once, that the chat template ends."""
        check_template_ends(self.tokenizer)

    def _begins_itself(self, ids: Sequence[int]) -> bool:
        """Whether the first of `ids` that is no white space is a token of the prefix."""
        for token in ids:
            if token in self.prefix:
                return True
            if str(self.tokenizer.decode([token])).strip():
                return False
        return False


def check_characters(characters: int, window: int | None) -> None:
    """Raise `JobError` for a prompt that would take long, or much memory, to tokenize, only to be refused."""
    most = _MOST_CHARACTERS
    if window is not None:
        most = min(most, max(_ALWAYS_TOKENIZED, _MOST_PER_TOKEN * window))
    if characters > most:
        why = "" if most == _MOST_CHARACTERS else f", which the model's window of {window} tokens cannot hold"
        raise JobError(f"the prompt has {characters:,} characters, more than {most:,}{why}; shorten it")
