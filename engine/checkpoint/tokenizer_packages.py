"""Packages that transformers imports only where a tokenizer's files are of a certain format."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError, InstallationError, named
from engine.reading import find_file, open_file

TEKKEN = "tekken.json"
_READ_BY_ITSELF = ("tokenizer.json", "vocab.json", "vocab.txt")
_MODELS = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "spm_char.model"),
    *("sentencepiece.model", "tiktoken.model"),
)
"""Files of SentencePiece or tiktoken; which of the two, their first line tells."""
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""A token in base64 and its rank."""


@dataclass(frozen=True)
class VocabularyFormat:
    """A format of vocabulary files that transformers reads by means of another package."""

    name: str
    """What the format is called."""
    packages: tuple[str, ...]
    """What `pip install` is given."""
    modules: tuple[str, ...]
    """What transformers imports of them."""

    @property
    def cure(self) -> str:
        """The command that installs what is missing."""
        return f"pip install {' '.join(self.packages)}"

    def problem(self) -> str | None:
        """Why files of this format cannot be read here: what a package's import says; None if they can."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # a package that is there may lack another one, or be built for another Python
                return named(error)
        return None


SENTENCEPIECE = VocabularyFormat("SentencePiece", ("sentencepiece", "protobuf"), ("sentencepiece", "google.protobuf"))
TIKTOKEN = VocabularyFormat("tiktoken", ("tiktoken",), ("tiktoken",))
MISTRAL = VocabularyFormat("tekken", ("mistral-common",), ("mistral_common.tokens.tokenizers.mistral",))
FORMATS = (SENTENCEPIECE, TIKTOKEN, MISTRAL)


def vocabulary_format(path: Path) -> tuple[Path, VocabularyFormat] | None:
    """The vocabulary file of a model directory that needs a package of its own, and its format.

    None where there is none, or one that transformers reads by itself.
    """
    if any(find_file(path / name, CheckpointError) for name in _READ_BY_ITSELF):
        return None
    if find_file(path / TEKKEN, CheckpointError):
        return path / TEKKEN, MISTRAL
    for file in (path / name for name in _MODELS):
        if find_file(file, CheckpointError):
            with open_file(file, CheckpointError) as stream:
                return file, TIKTOKEN if _TIKTOKEN_LINE.match(stream.read(1 << 12)) else SENTENCEPIECE
    return None


def check_packages(path: Path) -> None:
    """Raise `InstallationError` where the tokenizer of a model directory needs a package that cannot be imported.

    transformers itself names another package for SentencePiece files, and without mistral-common it makes a tokenizer
    of a tekken.json that puts no BOS before a text.
    """
    found = vocabulary_format(path)
    if found is None:
        return
    file, needed = found
    if problem := needed.problem():
        raise InstallationError(
            f"{file} is a tokenizer of {needed.name}, and transformers needs {' and '.join(needed.packages)} to read "
            f"it ({problem}); run `{needed.cure}`"
        )
