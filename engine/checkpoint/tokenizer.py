"""The tokenizer of a model directory, and the ids of its special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from engine.checkpoint.side_files import check_side_files, read_generation_config
from engine.checkpoint.tokenizer_packages import check_packages
from engine.errors import CheckpointError, named, shown


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; `CheckpointError` if it cannot be loaded. Runs no code of the directory.

    Raises `InstallationError` where its files need a package that cannot be imported.
    """
    check_side_files(path)
    check_packages(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a"))  # what its files say of lengths and texts is looked at only then
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
    """The ids of tokens that control generation; empty where there are none."""

    end_of_text: list[int]
    padding: list[int]


def special_tokens(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a model directory, as `transformers`' generate finds them."""
    sources = (read_generation_config(path), config.get_text_config(), tokenizer)

    def ids_of(name: str) -> list[int]:
        ids = next((found for source in sources if (found := getattr(source, name, None)) is not None), None)
        listed = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        for each in listed:
            if isinstance(each, bool) or not isinstance(each, int):
                raise CheckpointError(f"{path}: {name} is {shown(ids)}; a token id or a list of them is expected there")
        return list(listed)

    return SpecialTokens(ids_of("eos_token_id"), ids_of("pad_token_id"))
