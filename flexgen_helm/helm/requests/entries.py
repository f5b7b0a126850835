"""Requests prepared for HELM's cache and the engine: made one by one, or those of a run as few arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
from helm.common.key_value_store import request_to_key
from helm.common.request import Request
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.job import Job, Sampling
from engine.thinking import Thinking
from flexgen_helm.helm.requests.translate import Key, Translator

if TYPE_CHECKING:
    from flexgen_helm.helm.requests.known_tokens import KnownTokens

Settings = tuple[int, Sampling, tuple[str | tuple[int, ...], ...], bool, Thinking | None]
"""The settings of a job except its prompt: new tokens, sampling, stops, whether the prompt is scored, thinking rule."""
Jobs = tuple[tuple[int, ...], list[Job]]
"""Token ids of a prompt, and the jobs that answer its request."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A request that can be looked up."""

    request: Request
    """The part of the request that the answer is made from; its text may be left out."""
    key: Key
    """The key in the cache, without the identity of the model."""
    name: str
    """A digest of the key, which itself contains the prompt: equal requests have the same name."""
    jobs: Callable[[], Jobs]
    """Makes the jobs; raises `EngineError` if the request cannot be run."""


Found = Entry | EngineError
"""A request, or the error that keeps it from being looked up."""


def entries(translator: Translator, requests: Sequence[Request], ids_of: IdsOf | None = None) -> Iterator[Found]:
    """Make entries whose jobs are made when they are needed.

    `ids_of` gives the token ids of texts that have been tokenized already.
    """
    for request in requests:
        try:
            text = translator.render(request)
            key = translator.key(request, text)
        except EngineError as error:
            yield error
            continue
        name = sha256(request_to_key(key).encode()).hexdigest()
        yield Entry(request=request, key=key, name=name, jobs=_Making(translator, request, text, ids_of))


IdsOf = Callable[[str], Sequence[int] | None]


@dataclass(frozen=True)
class _Making:
    translator: Translator
    request: Request
    text: str
    ids_of: IdsOf | None

    def __call__(self) -> Jobs:
        own = None if self.ids_of is None else self.ids_of(self.text)
        ids = self.translator.encode(self.request, self.text, own)
        jobs = self.translator.jobs(self.request, self.text, ids)
        for job in jobs:
            job.check()
        return ids, jobs


@dataclass(frozen=True, kw_only=True)
class PackedEntries:
    """The entries of a run, with their jobs, in a form to send to another process."""

    requests: list[Request | EngineError]
    """Requests without texts, shared by equal ones; an error where a request cannot be looked up."""
    keys: list[Key]
    """The keys of those that can be looked up, as in the following."""
    names: list[str]
    ids: NDArray[np.int32]
    """The tokens of all prompts, concatenated."""
    ends: NDArray[np.int64]
    """The end of each prompt in `ids`; [entries]."""
    settings: list[list[Settings] | EngineError]
    """The settings of each entry's jobs; an error where it cannot be run."""

    @classmethod
    def made(cls, translator: Translator, requests: Sequence[Request], name: str, known: KnownTokens) -> PackedEntries:
        """Make the entries of a run, with all texts tokenized in one call; `name` is HELM's name of the tokenizer."""

        def ids_of(text: str) -> Sequence[int] | None:
            ids = known.ids(name, text)
            return None if ids is None else ids.tolist()

        found = list(entries(translator, requests, ids_of))
        known.encode(name, (entry.key["prompt"] for entry in found if isinstance(entry, Entry)))
        return cls.of(found)

    @classmethod
    def of(cls, found: Iterable[Found]) -> PackedEntries:
        """Make all jobs and pack them."""
        packed = _Packing()
        for entry in found:
            packed.add(entry)
        ends = np.cumsum([len(ids) for ids in packed.ids], dtype=np.int64) if packed.ids else np.zeros(0, np.int64)
        ids = np.fromiter(chain.from_iterable(packed.ids), np.int32)
        return cls(
            requests=packed.requests, keys=packed.keys, names=packed.names, ids=ids, ends=ends, settings=packed.settings
        )

    def unpack(self, share: Callable[[Sequence[int]], tuple[int, ...]]) -> Iterator[Found]:
        """Yield the entries in order; `share` makes token ids of a list of them."""
        borders = [0, *self.ends.tolist()]
        packed = zip(self.keys, self.names, pairwise(borders), self.settings, strict=True)
        for request in self.requests:
            if isinstance(request, EngineError):
                yield request
                continue
            key, name, (begin, end), settings = next(packed)
            yield Entry(request=request, key=key, name=name, jobs=_Unpacking(self.ids[begin:end], settings, share))


@dataclass(frozen=True)
class _Unpacking:
    ids: NDArray[np.int32]
    settings: list[Settings] | EngineError
    share: Callable[[Sequence[int]], tuple[int, ...]]

    def __call__(self) -> Jobs:
        if isinstance(self.settings, EngineError):
            raise self.settings
        ids = self.share(self.ids.tolist())
        return ids, [
            Job(
                prompt=ids,
                max_new_tokens=most,
                sampling=sampling,
                stop=stop,
                prompt_logprobs=is_scored,
                thinking=thinking,
            )
            for most, sampling, stop, is_scored, thinking in self.settings
        ]


@dataclass(eq=False)
class _Packing:
    """Makes equal parts of what is packed one object, which is pickled once."""

    requests: list[Request | EngineError] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ids: list[tuple[int, ...]] = field(default_factory=list)
    settings: list[list[Settings] | EngineError] = field(default_factory=list)
    _told: dict[tuple[int, bool], Request] = field(default_factory=dict)
    _same: dict[Settings, Settings] = field(default_factory=dict)

    def add(self, entry: Found) -> None:
        if isinstance(entry, EngineError):
            self.requests.append(entry)
            return
        asked = entry.request
        told = asked.num_completions, asked.echo_prompt  # everything that an answer depends on besides the jobs
        if told not in self._told:
            self._told[told] = replace(asked, prompt="", messages=None)
        self.requests.append(self._told[told])
        self.keys.append(entry.key)
        self.names.append(entry.name)
        try:
            ids, jobs = entry.jobs()
        except EngineError as error:
            self.ids.append(())
            self.settings.append(error)
        else:
            self.ids.append(ids)
            self.settings.append([self._same.setdefault(found, found) for found in map(_settings, jobs)])


def _settings(job: Job) -> Settings:
    stops = tuple(stop if isinstance(stop, str) else tuple(stop) for stop in job.stop)
    return job.max_new_tokens, job.sampling, stops, job.prompt_logprobs, job.thinking
