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
    """For errors: argument, or file and line."""
    jobs: tuple[Job, ...]

    @abstractmethod
    def answer(self, completions: Sequence[Completion], key: str) -> dict[str, Any]:
        """The line, once all jobs are done; one of them may have failed."""

    @abstractmethod
    def asked(self, identity: Mapping[str, Any]) -> Any:
        """What tells it from all others, as JSON has it: what is asked of which weights, and what comes back too."""

    def key(self, identity: Mapping[str, Any]) -> str:
        """A digest of `asked`."""
        return hashlib.sha256(json.dumps(self.asked(identity)).encode()).hexdigest()[:16]


class Format(ABC):
    """How prompts are written, and answers."""

    skips_bad = False
    """Whether prompts that cannot be asked never keep the others from it."""

    @property
    @abstractmethod
    def form(self) -> LineForm:
        """How a line of answers tells what it answers."""

    @abstractmethod
    def prompts(self) -> Sequence[Any]:
        """What is read from the command line and its input, `BadPrompt`s among it; at least one."""

    @abstractmethod
    def questions(
        self, prompts: Sequence[Any], tokenizer: PromptTokenizer, vocab_size: int | None
    ) -> tuple[list[Question], list[BadPrompt]]:
        """What can be asked of a model of so many token ids, in its order, and what cannot."""

    @abstractmethod
    def refusal(self, prompt: BadPrompt) -> dict[str, Any]:
        """The line of a prompt that cannot be asked."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Of the command line, what shapes answers, for the record."""


MOST_BYTES = 1_000_000_000
"""Of prompts, all of which are in memory together with their tokens."""


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
