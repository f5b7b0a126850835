"""Finds a model's answers in HELM's cache, and reports those of an earlier identity of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from helm.common.cache import CacheConfig

from engine.checkpoint.identity.result import differences, last_change, sampled_identity
from engine.errors import ConfigError, EngineError
from flexgen_helm.helm.engines import Served
from flexgen_helm.helm.request_cache import RequestCache, Response
from flexgen_helm.helm.requests.asked import Asked, Work
from flexgen_helm.helm.requests.entries import Found
from flexgen_helm.helm.requests.results import known_response
from flexgen_helm.helm.requests.translate import CLIENT, Key, Translator

_SETTINGS = ("dtype", "compress_weight", "compress_cache", "batch_invariant")
"""The parts of an identity that the policy sets: answers under other settings are not from an earlier state of the
model. The last one is in an identity only where it is set.
"""


class ClientCache:
    """HELM's cache for one client: opened on demand, if necessary by several threads at once."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._is_locked = False
        self.notes: list[str] = []
        """What happened to cached answers to the requests looked up so far, one line each."""

    @contextmanager
    def opened(self) -> Iterator[RequestCache]:
        """Open the cache; a file that another process has locked for long is waited for once, not in every run."""
        cache = RequestCache(self._config, **({"wait_s": 0.0} if self._is_locked else {}))
        try:
            opened = cache.__enter__()
        except ConfigError:
            self._is_locked = cache.is_locked
            raise
        self._is_locked = False
        with closing(cache):
            yield opened

    @contextmanager
    def kept(
        self, served: Served, translator: Translator, tell: Callable[[str], None] | None = None
    ) -> Iterator[KeptAnswers]:
        """Yield the cached answers of a model; afterwards calls `tell` with each line that is new in `notes`."""
        with self.opened() as cache:
            kept = KeptAnswers(cache, served, translator)
            yield kept
            kept.move()
        for note in kept.notes:
            if note not in self.notes:
                self.notes.append(note)
                if tell is not None:
                    tell(note)


class KeptAnswers:
    """Looks requests up in an open cache by everything that can change their results.

    A model's identity requires reading its weight files once, so it is needed only where the cache has an answer to the
    request, with any weights: otherwise there is nothing to find. An answer of another identity is not used. Answers of
    earlier releases, which identified weights by a sample, are used, and stored again, if no file of the identity has
    been written to since they were computed.
    """

    def __init__(self, cache: RequestCache, served: Served, translator: Translator) -> None:
        self._cache = cache
        self._served = served
        self._translator = translator
        heads = cache.heads(CLIENT)
        self._identities: list[dict[str, Any]] | None = None
        """The identities for which the cache has answers, as far as one may be the model's; None where that is
        unknown."""
        if heads is not None:
            self._identities = []
            for identity in (head["identity"] for head in heads):
                if identity not in self._identities and self._may_be_of_model(identity):
                    self._identities.append(identity)
        self._earlier: tuple[dict[str, Any], float] | None = None
        self._moved: list[tuple[Key, Response]] = []
        self._num_moved = 0
        self._outdated: dict[str, None] = {}
        """What has changed since requests were answered, without duplicates."""

    def look_up(self, found: Iterable[Found], under_way: Mapping[str, Work]) -> Asked:
        """Find the answers to requests, and prepare the others; `under_way` are requests of other runs, by name."""
        asked = Asked()
        for place, entry in enumerate(found):
            asked.total += 1
            if isinstance(entry, EngineError):
                asked.refused[place] = entry
            elif entry.name in under_way:
                asked.joined.setdefault(entry.name, []).append(place)
            elif entry.name in asked.todo:
                asked.todo[entry.name].places.append(place)
            elif response := known_response(self.find(entry.key)):
                asked.known[place] = response
            else:
                try:
                    ids, jobs = entry.jobs()
                except EngineError as error:
                    asked.refused[place] = error
                    continue
                asked.todo[entry.name] = Work(
                    name=entry.name, request=entry.request, key=entry.key, places=[place], ids=ids, jobs=jobs
                )
        return asked

    def find(self, key: Key) -> Response | None:
        """Return the usable answer to the request with this key, which contains no identity; None if there is none."""
        self._cache.count_query()
        if self._identities is None:
            return self._cache.get({**key, "identity": self._served.identity})
        found: list[tuple[dict[str, Any], Response]] = []
        for identity in self._identities:
            if response := self._cache.get(self._key(key, identity)):
                found.append((identity, response))
        if not found:
            return None
        own = self._served.identity
        for identity, response in found:
            if identity == own:
                return response
        for identity, response in found:
            if self._is_same(identity, response):
                self._moved.append(({**key, "identity": own}, response))
                return response
        latest, _ = max(found, key=lambda pair: ("source" in pair[0], str(pair[1].get("request_datetime", ""))))
        self._outdated[_told(latest, own)] = None
        return None

    def move(self) -> None:
        """Store the answers of earlier releases that were found under the keys of this release."""
        self._cache.put(self._moved, are_new=False)
        self._num_moved += len(self._moved)
        self._moved.clear()

    @property
    def notes(self) -> list[str]:
        """Describe what was done with answers of other identities, one line each, as a message for each run."""
        notes = list(self._outdated)
        if self._num_moved:
            notes.append(
                "answers that an earlier release kept in HELM's cache are used: weights, tokenizer and transformers' "
                "source of the family have not been written to since"
            )
        return notes

    def _key(self, key: Key, identity: dict[str, Any]) -> Key:
        whole = key if "source" in identity else self._translator.earlier_key(key)
        return {**whole, "identity": identity}

    def _may_be_of_model(self, identity: dict[str, Any]) -> bool:
        settings = self._served.settings
        return all(identity.get(name) == settings.get(name) for name in _SETTINGS)

    def _is_same(self, identity: dict[str, Any], response: Response) -> bool:
        """Whether an answer under the key of an earlier release was computed from the very files that exist now."""
        if "source" in identity:
            return False
        if self._earlier is None:
            try:
                path = self._served.description.path
                self._earlier = sampled_identity(path, self._served.policy), last_change(path)
            except (EngineError, OSError):
                self._earlier = {}, float("inf")
        earlier, changed = self._earlier
        asked = response.get("request_datetime")
        return identity == earlier and isinstance(asked, int) and asked > changed


def _told(earlier: dict[str, Any], now: Mapping[str, Any]) -> str:
    if "source" not in earlier:
        return (
            "requests that an earlier release answered are computed again, once: it knew weights by a sample, and what "
            "answers depend on is other, or was written to since"
        )
    return (
        "requests that HELM's cache has answers to are computed again, once, because of other "
        f"{differences(earlier, now)}"
    )
