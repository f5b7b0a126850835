"""Runs HELM's annotators with a judge: collects their requests, and gives them the judge's answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.annotation.annotator import Annotator, AnnotatorSpec
from helm.common.request import Request, RequestResult

from engine.errors import EngineError, one_line
from flexgen_helm.judging.judge import Judge
from flexgen_helm.judging.judge_client import JudgeClient, NotAnswered, key_of
from flexgen_helm.judging.kinds import API_NAME, Kind, kind_of
from flexgen_helm.judging.verdicts import READ, UNANSWERED, UNREADABLE, VERDICT, Verdicts

Make = Callable[[AnnotatorSpec], Annotator]
"""Creates an annotator, like `AnnotatorFactory.get_annotator`."""


class Annotating:
    """The annotators of one run."""

    def __init__(self, specs: Sequence[AnnotatorSpec], judge: Judge, make: Make) -> None:
        """Create the annotators; raises what they raise."""
        self._judge = judge
        self._client = JudgeClient(judge)
        self._annotators: list[tuple[Annotator, Kind | None]] = []
        for spec in specs:
            kind = kind_of(spec)
            given = {} if kind is None else {"auto_client": self._client}
            self._annotators.append((make(replace(spec, args={**spec.args, **given})), kind))

    def requests(self, states: Sequence[RequestState]) -> list[Request]:
        """The distinct requests to the judge; raises what annotators raise before they send requests."""
        asked: dict[str, Request] = {}
        with _quiet():
            for state in states:
                for annotator, kind in self._annotators:
                    for request in self._asked(annotator, state) if kind else ():
                        asked.setdefault(key_of(request), request)
        return list(asked.values())

    def _asked(self, annotator: Annotator, state: RequestState) -> list[Request]:
        self._client.answers, self._client.asked = {}, []
        with suppress(NotAnswered):
            annotator.annotate(state)
        return self._client.asked

    def annotated(self, state: ScenarioState, answers: Mapping[str, RequestResult]) -> ScenarioState:
        """The run's state with annotations; `answers` are the judge's, by `key_of`, to all of `requests`."""
        self._client.answers = answers
        with _quiet():
            states = [replace(each, annotations=dict(self._annotations(each))) for each in state.request_states]
        return replace(state, request_states=states)

    def _annotations(self, state: RequestState) -> Iterator[tuple[str, Any]]:
        for annotator, kind in self._annotators:
            yield annotator.name, annotator.annotate(state) if kind is None else self._judged(annotator, kind, state)

    def _judged(self, annotator: Annotator, kind: Kind, state: RequestState) -> dict[str, Any]:
        self._client.asked = []
        told: dict[str, Any] = {"judge": self._judge.model}
        try:
            found = annotator.annotate(state)
        except NotAnswered:
            raise EngineError(
                f"{annotator.name} asks its judge again when it has an answer; this is not supported"
            ) from None
        except Exception as error:  # some raise this way if they cannot read an answer
            if not self._client.asked:
                raise
            found, told["error"] = {}, one_line(error)
        annotation = {self._renamed(key): value for key, value in found.items()}
        if not self._client.asked:
            return {**annotation, **told}
        results = [self._client.answers[key_of(request)] for request in self._client.asked]
        if not all(result.success for result in results):
            told |= {VERDICT: UNANSWERED, "error": next(str(each.error) for each in results if not each.success)}
        elif kind.ends_with_score and results[-1].completions[0].finish_reason == {"reason": "length"}:
            told |= {VERDICT: UNREADABLE, "error": "the verdict is cut off", "response_text": _text(results[-1])}
        elif "error" not in told and kind.has_verdict(annotation, self._judge.name):
            told[VERDICT] = READ
        else:
            told |= {VERDICT: UNREADABLE, "response_text": _text(results[-1])}
        return {**annotation, **told}

    def _renamed(self, key: str) -> str:
        """Rename a key of an annotation from the replaced model to the judge."""
        return f"{self._judge.name}{key[len(API_NAME) :]}" if key.startswith(f"{API_NAME}_") else key


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of annotators from HELM's log: they write every answer that they cannot read there."""
    log = logging.getLogger("helm")
    level = log.level
    log.setLevel(max(log.getEffectiveLevel(), logging.ERROR))
    try:
        yield
    finally:
        log.setLevel(level)


def _text(result: RequestResult) -> str:
    return str(result.completions[0].text)


def verdict_of(state: RequestState) -> str | None:
    """The state of the verdict on an answer; None where none was requested."""
    found = [each.get(VERDICT) for each in (state.annotations or {}).values() if isinstance(each, dict)]
    return next((each for each in (UNANSWERED, UNREADABLE, READ) if each in found), None)


def count(states: Sequence[RequestState]) -> Verdicts:
    """The number of answers in each state."""
    found = [verdict_of(state) for state in states]
    return Verdicts(*(found.count(each) for each in (READ, UNREADABLE, UNANSWERED)))


def with_verdicts(state: ScenarioState) -> ScenarioState:
    """Remove the answers whose requested verdict is missing: they score nothing."""
    kept = [each for each in state.request_states if verdict_of(each) in (READ, None)]
    return replace(state, request_states=kept)
