"""Questions of `flexgen-helm complete`, and the two formats in which they come and are answered."""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.job import Completion, Job
from flexgen_helm.commands.completion.answers import LineForm, Place
from flexgen_helm.commands.completion.prompts import BadPrompt

if TYPE_CHECKING:
    from engine.text.prompt import PromptTokenizer


class Question(ABC):
    """What one line of the output answers."""

    place: Place
    where: str
    """The argument, or file and line, for errors."""
    jobs: tuple[Job, ...]

    @abstractmethod
    def answer(self, completions: Sequence[Completion], key: str) -> dict[str, Any]:
        """The line, once all jobs are done; one of them may have failed."""

    @abstractmethod
    def asked(self, identity: Mapping[str, Any]) -> Any:
        """The question's identity, as JSON: the job, the weights, and what is returned with the answer."""

    def key(self, identity: Mapping[str, Any]) -> str:
        """A digest of the identity."""
        return hashlib.sha256(json.dumps(self.asked(identity)).encode()).hexdigest()[:16]


class Format(ABC):
    """The format of prompts and answers."""

    skips_bad = False
    """Whether invalid prompts are skipped, so that the others run."""

    @property
    @abstractmethod
    def form(self) -> LineForm:
        """How a line of answers identifies what it answers."""

    @abstractmethod
    def prompts(self) -> Sequence[Any]:
        """The prompts of the command line and its input, `BadPrompt`s included; at least one."""

    @abstractmethod
    def questions(
        self, prompts: Sequence[Any], tokenizer: PromptTokenizer, vocab_size: int | None
    ) -> tuple[list[Question], list[BadPrompt]]:
        """The questions for a model of so many token ids, in order, and the prompts that cannot be run."""

    @abstractmethod
    def refusal(self, prompt: BadPrompt) -> dict[str, Any]:
        """The output line of a prompt that cannot be run."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings of the command line that affect answers, for the record."""


MOST_BYTES = 1_000_000_000
"""The most bytes of prompts, all of which are in memory together with their tokens."""


def read_lines(name: str) -> list[str]:
    """Lines of a file in UTF-8, or of standard input for `-`; raises `ConfigError`."""
    shown = shown_name(name)
    try:
        if name == "-" and sys.stdin is None:
            raise ConfigError("standard input is closed; name a file with --input")
        if name == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(name).open("rb") as stream:  # which may be a pipe: a shell's <(...) is one
                data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"--input {shown} has more than {MOST_BYTES:,} bytes; cut it into several files")
        return data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"--input {shown} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {shown} is not UTF-8 (byte {error.start}); convert it") from None


def shown_name(name: str) -> str:
    """What messages call an input."""
    return "standard input" if name == "-" else name
