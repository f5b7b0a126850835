"""A run's answers: how long they are, how many were cut off, and a few of them to read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.reading import open_file, read_json
from flexgen_helm.sweeps.record import Lengths

FEWEST_TOKENS = 16
"""Runs that allow fewer tokens ask for a letter, a word or a number: there is little to read or to cut off."""
MOST_CHARACTERS = 3_000
"""The most characters of a text that are shown; the rest is counted."""

_PIECE = 1 << 20
_BEGIN = re.compile(r'"request_states"\s*:\s*\[')
"""The beginning in the file; inside a text, quotes would be escaped."""
_BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """The beginning of a text."""

    text: str
    num_left_out: int
    """The number of characters that follow."""

    @classmethod
    def of(cls, text: str) -> Excerpt:
        """Take at most `MOST_CHARACTERS` of `text`."""
        return cls(text=text[:MOST_CHARACTERS], num_left_out=max(0, len(text) - MOST_CHARACTERS))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer, for reading."""

    why: str
    """Why it was chosen: "first", "longest", "cut off"."""
    instance: str
    """HELM's id of the instance."""
    asked: Excerpt
    """The instance's question, without instructions and examples."""
    thinking: Excerpt | None
    """The thinking; None where the model did not think."""
    answer: Excerpt
    tokens: int
    """The number of tokens of the answer."""
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers of one run; a request for several completions has as many answers."""

    lengths: Lengths
    """The lengths without thinking."""
    thought: int
    """Number of answers before which the model thought."""
    cut_off: int | None
    """The number of answers that were cut off at their limit; None where finish reasons are missing, as from HELM's
    own client of local models."""
    cut_off_thinking: int
    """The number of those that are empty because thinking used up their tokens."""
    samples: tuple[Sample, ...]


def read_answers(path: Path) -> Answers | None:
    """Read the answers of the run in a directory.

    None if it allows fewer than `FEWEST_TOKENS`, has none, or has files that cannot be read.
    """
    try:
        if read_json(path / "run_spec.json", ConfigError)["adapter_spec"]["max_tokens"] < FEWEST_TOKENS:
            return None
        return _counted(
            (state, completion)
            for state in request_states(path / "scenario_state.json")
            if not state["request"].get("echo_prompt")
            for completion in (state.get("result") or {}).get("completions", ())
        )
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def request_states(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each of HELM's request states in a `scenario_state.json`, one by one: the file may not fit into memory.

    Raises `ConfigError` for a file that cannot be read, `ValueError` for one that HELM has not written.
    """
    decoder, characters = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    with open_file(path, ConfigError) as stream:

        def more(least: int) -> str:
            piece = stream.read(max(_PIECE, least))
            if not piece:
                raise ValueError(f"{path} ends before its request states do")
            return characters.decode(piece)

        text = more(0)
        while (begin := _BEGIN.search(text)) is None:
            text += more(len(text))
        at = begin.end()
        while True:
            between = _BETWEEN.match(text, at)
            assert between is not None, "it matches nothing, too"
            at = between.end()
            if text.startswith("]", at):
                return
            try:
                state, at = decoder.raw_decode(text, at)
            except ValueError:
                text, at = text[at:] + more(len(text) - at), 0
            else:
                yield state


def _counted(found: Iterator[tuple[dict[str, Any], dict[str, Any]]]) -> Answers | None:
    numbers: list[int] = []
    most = thought = cut_off = cut_off_thinking = 0
    has_reasons = False
    first = longest = cut = None
    for state, completion in found:
        number = len(completion["tokens"])
        if completion["text"] and not number:  # from a client that returns no tokens
            return None
        reason = _reason(completion)
        has_reasons |= bool(reason)
        thinking = _thinking(completion)
        thought += thinking is not None
        if first is None:
            first = state, completion
        elif number > most:
            longest = state, completion
        most = max(most, number)
        if reason == "length":
            cut_off += 1
            cut_off_thinking += thinking is not None and not completion["text"]
            cut = cut or (state, completion)
        numbers.append(number)
    lengths = Lengths.of(numbers)
    if lengths is None:
        return None
    chosen: dict[int, Sample] = {}
    for why, pair in (("first", first), ("longest", longest), ("cut off", cut)):
        if pair is not None:
            chosen.setdefault(id(pair[1]), _sample(why, *pair))
    return Answers(
        lengths=lengths,
        thought=thought,
        cut_off=cut_off if has_reasons else None,
        cut_off_thinking=cut_off_thinking,
        samples=tuple(chosen.values()),
    )


def _reason(completion: Mapping[str, Any]) -> str:
    return str((completion.get("finish_reason") or {}).get("reason", ""))


def _thinking(completion: Mapping[str, Any]) -> str | None:
    found = completion.get("thinking")
    return None if found is None else str(found.get("text", ""))


def _sample(why: str, state: Mapping[str, Any], completion: Mapping[str, Any]) -> Sample:
    thinking = _thinking(completion)
    return Sample(
        why=why,
        instance=str(state["instance"].get("id", "")),
        asked=Excerpt.of(_asked(state)),
        thinking=None if thinking is None else Excerpt.of(thinking),
        answer=Excerpt.of(str(completion["text"])),
        tokens=len(completion["tokens"]),
        finish_reason=_reason(completion),
    )


def _asked(state: Mapping[str, Any]) -> str:
    """The instance's own text; if HELM stores none (a conversation), the last message."""
    text = str(state["instance"]["input"].get("text", ""))
    messages = state["request"].get("messages") or state["instance"]["input"].get("messages") or ()
    return text or (str(messages[-1]["content"]) if messages else str(state["request"].get("prompt", "")))
