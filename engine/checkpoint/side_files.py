"""The files of a model directory that hold no weights."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.adapters.declared import ADAPTER_CONFIG, ADAPTER_FOLDER
from engine.errors import CheckpointError, named
from engine.reading import find_file, open_file

if TYPE_CHECKING:
    from transformers import GenerationConfig

_log = logging.getLogger(__name__)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
MAX_SIDE_BYTES = 100_000_000
"""The largest size of one file; vocabularies are the largest, with some tens of megabytes."""
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "hf_quant_config.json",
)
OF_THE_MODEL = ("config.json", "generation_config.json", "hf_quant_config.json")
"""Files of the model; the others belong to the tokenizer."""
_TEMPLATES = "additional_chat_templates/*.jinja"
_OTHER_WHOLE = ("tekken.json", "tiktoken.model")
"""Other files that define a tokenizer alone. They are not in `TOKENIZER_FILES`, which the sampled identity covers."""
_OTHER_VOCABULARIES = (
    *_OTHER_WHOLE,
    *("normalizer.json", "bpe.codes", "vocab.bpe", "dict.txt", "byte_maps.json"),
    *("spm.model", "spm_char.model", "sentencepiece.model", "prophetnet.tokenizer"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "emoji.json"),
)
"""Further files that some families' tokenizers read."""


def found_side_files(path: Path) -> list[Path]:
    """All files there that can change token ids, prompts or results and hold no weights, in a fixed order."""
    names = sorted({*SIDE_FILES, *TOKENIZER_FILES, *_OTHER_VOCABULARIES})
    names.append(f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}")
    found = [path / name for name in names if find_file(path / name, CheckpointError)]
    return found + [file for file in sorted(path.glob(_TEMPLATES)) if find_file(file, CheckpointError)]


def is_vocabulary(file: Path) -> bool:
    """Whether a file, by its name, can define a tokenizer."""
    return file.name in (*TOKENIZER_FILES, *_OTHER_WHOLE)


def check_side_files(path: Path) -> None:
    """Raise `CheckpointError` unless there is a tokenizer, and all files that hold no weights can be read.

    Libraries open these files by themselves, and read them whole: a pipe without a writer would make them hang, and a
    file of gigabytes would take all memory.
    """
    found = found_side_files(path)
    if not any(map(is_vocabulary, found)):
        raise CheckpointError(f"{path} has no tokenizer (none of {', '.join((*TOKENIZER_FILES, *_OTHER_WHOLE))})")
    for file in found:
        with open_file(file, CheckpointError) as stream:
            size = os.fstat(stream.fileno()).st_size
        if size > MAX_SIDE_BYTES:
            raise CheckpointError(f"{file} has {size:,} bytes, and no such file needs more than {MAX_SIDE_BYTES:,}")


def read_generation_config(path: Path) -> GenerationConfig | None:
    """The generation config of a model directory; None where `from_pretrained` ignores it: it is missing, or no JSON.

    Raises `CheckpointError` for invalid values: transformers does not load such a model either.
    """
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if not find_file(file, CheckpointError):
        return None
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        _log.warning("flexgen-helm: %s is no JSON and left out, as transformers leaves it out", file)
    except Exception as error:  # whatever its values lead to
        raise CheckpointError(f"{file} is invalid: {named(error)}; correct or remove it") from None
    return None
