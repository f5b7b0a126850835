"""The HELM client: HELM's cache in front, the engine behind, whole runs or single requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from helm.clients.client import CachingClient
from helm.common.cache import CacheConfig, cache_stats, create_key_value_store, write_to_key_value_store
from helm.common.key_value_store import request_to_key
from helm.common.request import Request, RequestResult
from helm.tokenizers.tokenizer import Tokenizer

from flexgen_helm import require_engine

require_engine()

from engine.errors import CheckpointError, ConfigError, EngineError  # noqa: E402 - first the line that says whose engine this is
from engine.job import Completion, Job  # noqa: E402
from engine.policy import Policy  # noqa: E402
from flexgen_helm.engines import Served, engines  # noqa: E402
from flexgen_helm.translate import (  # noqa: E402
    Key,
    Response,
    Timing,
    Translator,
    failure,
    result,
)

Progress = Callable[[int, int, int], None]
"""Called with (requests done, requests in all, tokens that the engine worked through for those done)."""


@dataclass(eq=False, kw_only=True)
class _Work:
    """A request that is not in the cache, and the places of all requests that are equal to it."""

    request: Request
    key: Key
    places: list[int]
    ids: tuple[int, ...]
    jobs: list[Job]
    completions: dict[int, Completion] = field(default_factory=dict)


class FlexGenClient(CachingClient):
    """Serves a model that may be larger than the GPU.

    Cheap to make, because HELM makes several at once: tokenizer, fingerprint and engine come with the first request,
    and the engine is shared by all clients of the same model and policy.

    `policy` is "auto", the name of a shipped policy, a YAML file, or the mapping itself. `apply_chat_template` is, if
    left out, whether the tokenizer has one. `top_k` restricts sampling (HELM's `top_k_per_token` asks for candidates
    and never does). `window` is the most positions the model takes, where its files do not tell. Everything that HELM
    injects is told by the parameters' names.
    """

    def __init__(
        self,
        cache_config: CacheConfig,
        tokenizer: Tokenizer,
        tokenizer_name: str | None = None,
        model_name: str | None = None,
        end_of_text_token: str | None = None,
        pretrained_model_name_or_path: str | None = None,
        policy: str | Mapping[str, Any] | None = "auto",
        apply_chat_template: bool | None = None,
        top_k: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(cache_config=cache_config)
        self._model = pretrained_model_name_or_path or model_name or ""
        if not self._model:
            raise ConfigError("the model deployment names no model; set pretrained_model_name_or_path in its args")
        if not hasattr(tokenizer, "get_wrapped_tokenizer"):
            raise ConfigError(
                f"tokenizer {tokenizer_name} of {self._model} is a {type(tokenizer).__name__}; its tokenizer config "
                "must name helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer"
            )
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k {top_k} of {self._model} is below 1; leave it out to sample among all tokens")
        if window is not None and window < 1:
            raise ConfigError(f"window {window} of {self._model} is below 1; leave it out to take the model's own")
        self._tokenizer = tokenizer
        self._policy = Policy.load(policy)
        self._end_of_text_token = end_of_text_token
        self._apply_chat_template = apply_chat_template
        self._top_k = top_k
        self._window = window

    @cached_property
    def _served(self) -> Served:
        return engines.served(self._model, self._policy)

    @cached_property
    def _translator(self) -> Translator:
        pad = self._policy.pad_to_seq_len
        try:
            tokenizer = self._tokenizer.get_wrapped_tokenizer()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"HELM's tokenizer of {self._model} cannot be loaded: {reason}") from None
        return Translator(
            tokenizer,
            model=self._model,
            window=self._window_of_model(),
            is_window_given=self._window is not None,
            pad_to=pad if isinstance(pad, int) else None,
            end_of_text_token=self._end_of_text_token,
            apply_chat_template=self._apply_chat_template,
            top_k=self._top_k,
        )

    def _window_of_model(self) -> int | None:
        own = self._served.description.window
        if self._window is not None and own is not None and self._window > own:
            raise ConfigError(f"window {self._window} of {self._model} exceeds the {own} of its config; leave it out")
        return own if self._window is None else self._window

    def check(self, requests: Sequence[Request]) -> None:
        """Raise the error of the first request that cannot be run, saying how many there are; loads no weights."""
        bad: list[tuple[int, EngineError]] = []
        for number, request in enumerate(requests, start=1):
            try:
                text = self._translator.render(request)
                for job in self._translator.jobs(request, text, self._translator.encode(text)):
                    job.check()
            except EngineError as error:
                bad.append((number, error))
        if bad:
            number, first = bad[0]
            raise type(first)(f"{len(bad)} of {len(requests)} requests cannot be run; number {number}: {first}")

    def make_request(self, request: Request) -> RequestResult:
        """Answer one request from the cache, or together with those that other threads are making."""

        def compute() -> Response:
            started = time.time()
            ids = self._translator.encode(text)
            answer = self._served.batcher.ask(self._translator.jobs(request, text, ids))
            timing = Timing(seconds=answer.seconds, started=started, num_requests=answer.num_requests)
            return self._translator.response(request, ids, answer.completions, timing)

        try:
            with self._served.batcher.arriving():
                text = self._translator.render(request)
                key = self._translator.key(request, text, self._served.identity)
                response, cached = self.cache.get(key, compute)
        except EngineError as error:
            return failure(request, error)
        return result(response, cached=cached)

    def make_requests(self, requests: Sequence[Request], progress: Progress | None = None) -> list[RequestResult]:
        """Answer all requests, in their order; what is not in the cache goes to the engine in one call.

        Each result is in HELM's cache as soon as the engine yields it. A bad request fails in its own result; raises
        `EngineError` for a fault of model, policy or engine.
        """
        report = progress or (lambda done, total, tokens: None)
        translator, identity = self._translator, self._served.identity
        results: dict[int, RequestResult] = {}
        num_tokens = 0
        with create_key_value_store(self.cache.config) as store:
            todo: dict[str, _Work] = {}
            for place, request in enumerate(requests):
                try:
                    text = translator.render(request)
                    key = translator.key(request, text, identity)
                    name = request_to_key(key)
                    if name in todo:
                        todo[name].places.append(place)
                        continue
                    cache_stats.increment_query(self.cache.config.cache_stats_key)
                    if stored := store.get(key):
                        results[place] = result(stored, cached=True)
                        continue
                    ids = translator.encode(text)
                    jobs = translator.jobs(request, text, ids)
                    todo[name] = _Work(request=request, key=key, places=[place], ids=ids, jobs=jobs)
                except EngineError as error:
                    results[place] = failure(request, error)
            report(len(results), len(requests), num_tokens)
            for work, response in self._run(list(todo.values())):
                if isinstance(response, EngineError):
                    answered = failure(work.request, response)
                else:
                    cache_stats.increment_compute(self.cache.config.cache_stats_key)
                    write_to_key_value_store(store, work.key, response)
                    answered = result(response, cached=False)
                results.update(dict.fromkeys(work.places, answered))
                num_tokens += len(work.ids) + sum(len(each.tokens) for each in work.completions.values())
                report(len(results), len(requests), num_tokens)
        return [results[place] for place in range(len(requests))]

    def _run(self, todo: Sequence[_Work]) -> Iterator[tuple[_Work, Response | EngineError]]:
        """Yield each piece of work with its response, or with the error of its jobs, as soon as it is done."""
        if not todo:
            return
        owners = [(work, position) for work in todo for position in range(len(work.jobs))]
        started = time.time()
        for done in self._served.stream([work.jobs[position] for work, position in owners]):
            work, position = owners[done.index]
            work.completions[position] = done.completion
            if len(work.completions) == len(work.jobs):
                completions = [work.completions[i] for i in range(len(work.jobs))]
                timing = Timing(seconds=done.seconds, started=started, num_requests=len(todo))
                try:
                    yield work, self._translator.response(work.request, work.ids, completions, timing)
                except EngineError as error:
                    yield work, error
