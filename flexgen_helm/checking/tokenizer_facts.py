"""What there is to know of a model's tokenizer and chat template before a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.tokenizer import special_tokens
from engine.checkpoint.tokenizer_packages import vocabulary_format
from engine.errors import CheckpointError
from engine.text.prompt import PromptTokenizer
from engine.text.template import check_template_ends

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer in numbers and words."""

    kind: str
    """Its class in transformers, and the library that reads its vocabulary."""
    tokens: int
    before_a_text: tuple[str, ...]
    """The tokens that stand before a prompt."""
    end_of_text: tuple[int, ...]
    has_chat_template: bool
    notes: tuple[str, ...]
    """What may surprise."""

    def lines(self) -> list[str]:
        """The facts in words."""
        before = " ".join(self.before_a_text) or "nothing"
        template = "a chat template" if self.has_chat_template else "no chat template"
        return [f"{self.kind}, {self.tokens:,} tokens, {before} before a text, {template}"]


def tokenizer_facts(
    path: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, rows: int
) -> TokenizerFacts:
    """The facts about a loaded tokenizer and its model, whose token embedding has `rows` rows.

    Raises `EngineError` for a tokenizer that cannot encode prompts.
    """
    prefix = PromptTokenizer.of(tokenizer).prefix
    special = special_tokens(path, config, tokenizer)
    read = vocabulary_format(path)
    notes = []
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        notes.append(
            f"the tokenizer has tokens up to {highest}, and the model's table ends at {rows - 1}: prompts with a token "
            "beyond it are refused"
        )
    if not special.end_of_text:
        notes.append("no file names an end-of-text token: completions end at stops and at their length only")
    try:
        check_template_ends(tokenizer)
    except CheckpointError as error:
        notes.append(str(error))
    return TokenizerFacts(
        kind=f"{type(tokenizer).__name__}{f' by {read[1].packages[0]}' if read else ''}",
        tokens=len(tokenizer),
        before_a_text=tuple(str(tokenizer.decode([token])) for token in prefix),
        end_of_text=tuple(special.end_of_text),
        has_chat_template=bool(tokenizer.chat_template),
        notes=tuple(notes),
    )
