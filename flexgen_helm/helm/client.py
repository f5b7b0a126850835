"""The HELM client: HELM's cache first, then the engine, for whole runs or single requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helm.clients.client import CachingClient
from helm.common.cache import CacheConfig
from helm.common.hierarchical_logger import hlog
from helm.common.request import Request, RequestResult
from helm.tokenizers.tokenizer import Tokenizer

from flexgen_helm import require_engine

require_engine()

from engine.checkpoint.hub import with_revision  # noqa: E402 - after the line that says whose engine
from engine.checkpoint.side_files import read_generation_config  # noqa: E402
from engine.errors import CheckpointError, ConfigError, EngineError, one_line  # noqa: E402
from engine.job import Job  # noqa: E402
from engine.policy import Policy  # noqa: E402
from flexgen_helm.helm.engines import Observer, Served, engines  # noqa: E402
from flexgen_helm.helm.kept_answers import ClientCache  # noqa: E402
from flexgen_helm.helm.request_cache import RequestCache  # noqa: E402
from flexgen_helm.helm.requests.asked import Answer, Asked, Portion, Work, raise_first  # noqa: E402
from flexgen_helm.helm.requests.carrying import Carrier  # noqa: E402
from flexgen_helm.helm.requests.entries import Found, PackedEntries, entries  # noqa: E402
from flexgen_helm.helm.requests.results import Response, Timing, failure, known_response, result  # noqa: E402
from flexgen_helm.helm.requests.shaping import Shaping  # noqa: E402
from flexgen_helm.helm.requests.translate import Translator  # noqa: E402
from flexgen_helm.workers.running_engine import RunningEngine  # noqa: E402

if TYPE_CHECKING:
    from flexgen_helm.helm.requests.known_tokens import KnownTokens

Progress = Callable[[int, int, int], None]
"""Called with (requests done, requests in total, tokens that the engine computed for those done)."""


class FlexGenClient(CachingClient):
    """Serves a model that may be larger than the GPU.

    It is cheap to create, because HELM creates several at once: tokenizer, fingerprint and engine are loaded with the
    first request, and the engine is shared by all clients of the same model and policy.

    `policy` is "auto", the name of a shipped policy, a YAML file, or the mapping itself. `window` is the maximum number
    of positions of a sequence, in place of the model's own. `revision` is a branch, tag or commit of a hub id, which
    may also be part of it: `org/model@revision`. `shaping` are the args of `Shaping`. HELM injects its arguments by the
    parameters' names.
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
        window: int | None = None,
        revision: str | None = None,
        **shaping: Any,
    ) -> None:
        super().__init__(cache_config=cache_config)
        named = pretrained_model_name_or_path or model_name or ""
        if not named:
            raise ConfigError("the model deployment names no model; set pretrained_model_name_or_path in its args")
        self._model = with_revision(named, revision)
        if not hasattr(tokenizer, "get_wrapped_tokenizer"):
            raise ConfigError(
                f"tokenizer {tokenizer_name} of {self._model} is a {type(tokenizer).__name__}; its tokenizer config "
                "must name helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer"
            )
        self._tokenizer = tokenizer
        self.tokenizer_name = tokenizer_name or ""
        """HELM's name of the tokenizer."""
        self.policy = Policy.load(policy)
        self._end_of_text_token = end_of_text_token
        self._shaping = Shaping.of(shaping)
        self._window = window
        self._answers = ClientCache(cache_config)

    @cached_property
    def _served(self) -> Served:
        return engines.served(self._model, self.policy, self._window)

    @cached_property
    def _translator(self) -> Translator:
        pad = self.policy.pad_to_seq_len
        settings = read_generation_config(Path(self._served.description.path))
        try:
            tokenizer = self._tokenizer.get_wrapped_tokenizer()
        except Exception as error:
            raise CheckpointError(f"HELM's tokenizer of {self._model} cannot be loaded: {one_line(error)}") from None
        return Translator(
            tokenizer,
            model=self._model,
            window=self._served.description.window,
            is_window_given=self._window is not None,
            pad_to=pad if isinstance(pad, int) else None,
            end_of_text_token=self._end_of_text_token,
            shaping=self._shaping,
            generation_config={} if settings is None else settings.to_dict(),
        )

    @property
    def notes(self) -> list[str]:
        """Settings beyond the requests' own that affect answers, one line each, for the first lines of a run.

        Lines about cached answers to the requests looked up so far are included.
        """
        notes, window = [*self._translator.notes, *self._answers.notes], self._window
        own = engines.served(self._model, self.policy).description.window if window is not None else None
        if own is not None and window != own:
            notes.append(
                f"sequences of {self._model} have up to {window} positions, as set by window, in place of {own}"
            )
        return notes

    @property
    def applies_chat_template(self) -> bool:
        """Whether prompts that are answered go through the tokenizer's chat template."""
        return self._translator.applies_chat_template

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Everything of the model and policy that can change a result; waits as `Served.identity` does."""
        return self._served.identity

    @property
    def known_identity(self) -> dict[str, str | int | None] | None:
        """`identity` once an answer was found or computed; None before that, because computing it may take long.

        A process without an engine is given the identity.
        """
        return self._served.known_identity

    @known_identity.setter
    def known_identity(self, identity: dict[str, str | int | None]) -> None:
        self._served.known_identity = identity

    @property
    def source(self) -> tuple[str, str]:
        """The model's directory, and the dtype of its weights."""
        return self._served.description.path, self._served.description.dtype

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the date."""
        return self._translator.writes_date

    def begin(self, moment: datetime) -> None:
        """Set the time that chat templates see to `moment`, instead of the time of the first request."""
        self._translator.begin(moment)

    def close(self) -> None:
        """Close the engine, if it is loaded, after the current sweep; calls that wait for it fail."""
        if "_served" in self.__dict__:
            self._served.close()

    def check(self, requests: Sequence[Request]) -> None:
        """Raise the error of the first request that cannot be run, saying how many there are; loads no weights."""
        bad: dict[int, EngineError] = {}
        for place, entry in enumerate(entries(self._translator, requests)):
            try:
                if isinstance(entry, EngineError):
                    raise entry
                entry.jobs()
            except EngineError as error:
                bad[place] = error
        raise_first(bad, len(requests))

    def make_request(self, request: Request) -> RequestResult:
        """Answer one request from the cache, or together with those that other threads are making."""
        engines.guard.check()

        def compute() -> Response:
            started = time.time()
            ids = self._translator.encode(request, text)
            jobs = self._translator.jobs(request, text, ids)
            answer = self._served.batcher.ask(jobs)
            self._served.check_weights()
            timing = Timing(seconds=answer.seconds, started=started, num_requests=answer.num_requests)
            return self._translator.response(request, jobs, answer.completions, timing)

        try:
            with self._served.batcher.arriving():
                text = self._translator.render(request)
                key = self._translator.key(request, text)
                with self._answers.kept(self._served, self._translator, tell=hlog) as kept:
                    known = known_response(kept.find(key))
                if known is not None:
                    return result(known, cached=True)
                response = compute()
                with self._answers.opened() as cache:
                    cache.put([({**key, "identity": self._served.identity}, response)])
        except EngineError as error:
            return failure(request, error)
        return result(response, cached=False)

    def make_requests(
        self, requests: Sequence[Request], progress: Progress | None = None, observe: Observer | None = None
    ) -> list[RequestResult]:
        """Answer all requests, in their order; what is not in the cache goes to the engine in one call.

        Results are in HELM's cache as soon as their sweep ends. A bad request fails in its own result; raises
        `EngineError` for a fault of model, policy or engine.
        """
        engines.guard.check()
        report = progress or (lambda done, total, tokens: None)
        asked = self.find(entries(self._translator, requests))
        results = {place: result(response, cached=True) for place, response in asked.known.items()}
        results.update({place: failure(requests[place], error) for place, error in asked.refused.items()})
        num_tokens = 0
        report(len(results), len(requests), num_tokens)
        with Carrier(lambda: self.carry_out(asked, observe), self.close) as carrier:
            for answers in carrier:
                for answer in answers:
                    results.update(dict.fromkeys(answer.work.places, answer.result))
                    num_tokens += answer.prompt_tokens + answer.new_tokens
                report(len(results), len(requests), num_tokens)
        return [results[place] for place in range(len(requests))]

    def pack(self, requests: Sequence[Request], known: KnownTokens) -> PackedEntries:
        """Make what `unpack` makes entries of, in another process; `known` stores the tokens of the prompts."""
        return PackedEntries.made(self._translator, requests, self.tokenizer_name, known)

    def unpack(self, packed: PackedEntries) -> Iterator[Found]:
        """The entries of a run, for `find`."""
        return packed.unpack(self._translator.one_of_each)

    def find(self, found: Iterable[Found], under_way: Mapping[str, Work] | None = None) -> Asked:
        """Look requests up in HELM's cache, and prepare the remaining ones; loads no weights.

        A request that equals one of `under_way` is neither looked up nor computed again: its positions are in
        `Asked.joined`. Raises `EngineError` for a fault of model, policy or cache.
        """
        with self._answers.kept(self._served, self._translator) as kept:
            return kept.look_up(found, under_way or {})

    def carry_out(self, asked: Asked, observe: Observer | None = None) -> Iterator[list[Answer]]:
        """Have the engine compute the remaining requests of `asked`, and yield each sweep's answers as they are stored.

        Empties `asked.todo`, so that nothing is held longer than needed. `observe` gets the engine's sweeps.
        """
        portion, asked.todo = Portion(list(asked.todo.values())), {}
        if not portion.num_requests:
            return
        with self._answers.opened() as cache:
            for finished in self._served.sweeps(portion.take_jobs(), observe):
                yield self._keep(cache, portion.done(finished))

    def asking(self, portion: Portion) -> Iterator[list[tuple[Work, Timing]]]:
        """Have the engine answer a portion, possibly while it works on others; yields what each sweep has finished."""
        for finished in self._served.sweeps(portion.take_jobs()):
            yield portion.done(finished)

    @contextmanager
    def running(self, jobs: Sequence[Job], share: float, observe: Observer) -> Iterator[RunningEngine]:
        """Load the engine for work of which `jobs` are a `share`, and keep it; `observe` gets its sweeps meanwhile."""
        with self._served.running(jobs, share) as engine:
            engine.observer = partial(observe, engine)
            try:
                yield engine
            finally:
                engine.observer = None

    @contextmanager
    def keeping(self) -> Iterator[Callable[[Iterable[tuple[Work, Timing]]], list[Answer]]]:
        """Yield a function that stores answers of the engine in HELM's cache and returns them."""
        with self._answers.opened() as cache:
            yield partial(self._keep, cache)

    def _keep(self, cache: RequestCache, done: Iterable[tuple[Work, Timing]]) -> list[Answer]:
        answers, kept = [], []
        for work, timing in done:
            response = self._response(work, timing)
            if not isinstance(response, EngineError):
                kept.append(({**work.key, "identity": self._served.identity}, response))
            answers.append(Answer.of(work, response))
        self._served.check_weights()
        cache.put(kept)
        return answers

    def _response(self, work: Work, timing: Timing) -> Response | EngineError:
        completions = [work.completions[place] for place in range(len(work.jobs))]
        try:
            return self._translator.response(work.request, work.jobs, completions, timing)
        except EngineError as error:
            return error
