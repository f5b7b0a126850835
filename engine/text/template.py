"""Checks once that a chat template ends, by counting its steps for conversations of a few letters."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_STEPS = 2_000_000
"""The most lines of a template, and calls of functions; the largest templates take 20,000, compilation included."""
MOST_S = 10.0
"""The same limit in seconds, for steps that are long by themselves; usual is 0.05."""
MOST_BYTES = 2 << 30
"""The same limit in bytes of memory, which one step may ask for: enough for what the process does meanwhile."""
MOST_CHARACTERS = 1_000_000
"""The most characters of its text; the longest instructions that templates write have some ten thousand."""
_LIMITING = threading.Lock()
_OWN_CODE = "<template>"
"""The file name of a compiled template's frames."""
_USER, _SYSTEM, _ANSWER = ({"role": role, "content": "a"} for role in ("user", "system", "assistant"))
_CONVERSATIONS = [[_USER], [_SYSTEM, _USER, _ANSWER, _USER]]


def check_template_ends(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
    """Raise `CheckpointError` for a chat template that does not end, or is invalid; later renderings are not watched.

    `variables` are passed to it. A template that refuses these conversations, or has another error, says so when it is
    used.
    """
    from jinja2 import TemplateSyntaxError

    if not tokenizer.chat_template:
        return
    template = tokenizer.get_chat_template()
    if _computes_powers(template):
        raise CheckpointError(
            f"the chat template of {tokenizer.name_or_path} computes a power (**), whose digits may not end; write the "
            "number itself, or run the model without its template"
        )
    for conversation in _CONVERSATIONS:
        try:
            with _little_memory(), _counting_steps():
                written = tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=True, **(variables or {})
                )
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template of {tokenizer.name_or_path} cannot be read: line {error.lineno}: "
                f"{one_line(error)}; fetch it again, or run the model without its template"
            ) from None
        except MemoryError:
            raise CheckpointError(
                f"the chat template of {tokenizer.name_or_path} takes more than {MOST_BYTES:,} bytes of memory for "
                f"{len(conversation)} messages of one letter each; mend it, or run the model without its template"
            ) from None
        except Exception:  # what templates raise, and what they meet
            continue
        except _TooManySteps:
            raise CheckpointError(
                f"the chat template of {tokenizer.name_or_path} does not end: with {len(conversation)} messages of one "
                f"letter each it took more than {MOST_STEPS:,} steps or {MOST_S:g} s; mend it, or run the "
                "model without its template"
            ) from None
        if len(written) > MOST_CHARACTERS:
            raise CheckpointError(
                f"the chat template of {tokenizer.name_or_path} writes {len(written):,} characters for "
                f"{len(conversation)} messages of one letter each, more than {MOST_CHARACTERS:,}; mend it, or run the "
                "model without its template"
            )


class _TooManySteps(BaseException):
    """Not an `Exception`, since templates' own code and `transformers` take those for a refusal."""


@contextmanager
def _counting_steps() -> Iterator[None]:
    """Inside, this thread may take `MOST_STEPS` (calls of functions, and lines of templates); else `_TooManySteps`."""
    before, left, end = sys.gettrace(), MOST_STEPS, time.monotonic() + MOST_S

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or time.monotonic() > end:
            raise _TooManySteps
        return trace if frame.f_code.co_filename == _OWN_CODE else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _little_memory() -> Iterator[None]:
    """Inside, this process may take `MOST_BYTES` more of memory; who asks for more gets `MemoryError`.

    One thread at a time: the limit is the process's, and each restores what it has found.
    """
    with _LIMITING:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        limits = [each for each in (taken + MOST_BYTES, soft, hard) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def names_in_template(template: str) -> set[str]:
    """The names that a chat template looks up, its own variables included, attributes excluded."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [each for each in Environment().lex(template) if each[1] != "whitespace"]
    except TemplateSyntaxError:
        return set()
    return {text for before, (_, kind, text) in pairwise([(0, "", ""), *tokens]) if kind == "name" and before[2] != "."}


def _computes_powers(template: str) -> bool:
    """Whether `**` occurs between two values: Python computes such a number in one step, of any length.

    It also occurs before the named arguments of a call.
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [each for each in Environment().lex(template) if each[1] != "whitespace"]
    except TemplateSyntaxError:
        return False
    ends = ("name", "integer", "float", "string")
    return any(
        (kind, text) == ("operator", "**") and (before[1] in ends or before[2] in (")", "]", "}"))
        for before, (_, kind, text) in pairwise(tokens)
    )
