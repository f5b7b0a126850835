"""The client that annotators get: it records their requests, and returns the judge's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from helm.clients.client import Client
from helm.common.request import Request, RequestResult

from flexgen_helm.judging.judge import Judge


class NotAnswered(BaseException):
    """Raised when the judge has not answered yet. No `Exception`, because annotators take those for answers."""


class JudgeClient(Client):
    """Replaces HELM's `AutoClient`, with the judge in place of every model that is called.

    Annotators send one request at a time and wait for its answer. So they are called twice: first their requests are
    recorded, for the judge to answer all of them together; then they get the answers.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.answers: Mapping[str, RequestResult] = {}
        """The judge's answers, by `key_of` the request."""
        self.asked: list[Request] = []
        """The requests since this was last emptied, as the judge gets them."""

    def make_request(self, request: Request) -> RequestResult:
        """Return the judge's answer; raises `NotAnswered` if there is none."""
        request = replace(request, model=self._judge.model, model_deployment=self._judge.deployment)
        self.asked.append(request)
        answer = self.answers.get(key_of(request))
        if answer is None:
            raise NotAnswered
        return answer


def key_of(request: Request) -> str:
    """A key that is equal for equal requests."""
    return repr(request)
