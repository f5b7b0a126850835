"""Packages that transformers imports only for tokenizer files of certain formats."""

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
"""Vocabulary files of SentencePiece or tiktoken; their first line shows which."""
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""The form of a tiktoken line: a token in base64 and its rank."""


@dataclass(frozen=True)
class VocabularyFormat:
    """A format of vocabulary files that transformers reads by means of another package."""

    name: str
    """The name of the format."""
    packages: tuple[str, ...]
    """The arguments of `pip install`."""
    modules: tuple[str, ...]
    """The modules that transformers imports."""

    @property
    def cure(self) -> str:
        """The command that installs the missing packages."""
        return f"pip install {' '.join(self.packages)}"

    def problem(self) -> str | None:
        """Why files of this format cannot be read, by the error of the import; None if they can."""
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
    """The vocabulary file of a model directory that needs an extra package, and its format.

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
