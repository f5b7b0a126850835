"""The tokenizer of a model directory, and the ids of its special tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from engine.checkpoint.side_files import check_side_files
from engine.errors import CheckpointError, named, shown
from engine.reading import find_file

_log = logging.getLogger(__name__)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; `CheckpointError` if it cannot be loaded. Runs no code of the directory."""
    check_side_files(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # its library raises bare exceptions, and whatever files of another shape lead to
        import tokenizers
        import transformers

        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded by transformers {transformers.__version__} and tokenizers "
            f"{tokenizers.__version__}: {named(error)}; fetch its files again, or update "
            "the packages if the files are newer"
        ) from None
    return tokenizer


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of tokens that mean something to whoever generates; empty where there are none."""

    end_of_text: list[int]
    padding: list[int]


def special_tokens(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a model directory, as `transformers`' generate finds them."""
    sources = (_generation_config(path), config.get_text_config(), tokenizer)

    def ids_of(name: str) -> list[int]:
        ids = next((found for source in sources if (found := getattr(source, name, None)) is not None), None)
        listed = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        for each in listed:
            if isinstance(each, bool) or not isinstance(each, int):
                raise CheckpointError(f"{path}: {name} is {shown(ids)}; a token id or a list of them is expected there")
        return list(listed)

    return SpecialTokens(ids_of("eos_token_id"), ids_of("pad_token_id"))


def _generation_config(path: Path) -> Any:
    """The model's generation_config.json; None where `from_pretrained` goes on without: it is not there, or no JSON."""
    file = path / "generation_config.json"
    if not find_file(file, CheckpointError):
        return None
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        _log.warning("flexgen-helm: %s is no JSON and left out, as transformers leaves it out", file)
    except Exception as error:  # values that it cannot mean: transformers does not load such a model either
        raise CheckpointError(f"{file} cannot be meant: {named(error)}; mend it or take it away") from None
    return None
