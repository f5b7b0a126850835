"""The chunks of a streamed answer of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from engine.job import Completion, Job
from flexgen_helm.adapters.openai.bodies import CHAT, Asked
from flexgen_helm.adapters.openai.model import Model, usage


class Chunks:
    """Makes the chunks of one answer, with the text of a choice in one chunk."""

    def __init__(self, model: Model, asked: Asked, jobs: Sequence[Job], name: str) -> None:
        """`name` is the base of the id that all chunks have."""
        self._model, self._asked, self._jobs = model, asked, jobs
        self._is_chat = asked.endpoint == CHAT
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{name}",
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream_usage:
            self._head["usage"] = None
        self._done: dict[int, Completion] = {}

    def beginning(self) -> Iterator[dict[str, Any]]:
        """The first chunk, with the assistant's role, sent before anything is computed."""
        for index in range(len(self._jobs)) if self._is_chat else ():
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None}, None)

    def of(self, index: int, done: Completion) -> list[dict[str, Any]]:
        """The chunks of a complete choice; raises its error if it failed."""
        if done.error is not None:
            raise done.error
        self._done[index] = done
        job = self._jobs[index]
        if not self._is_chat:
            choice = self._model.text_choice(self._asked, job, done, index)
            return [self._chunk(index, choice, choice["finish_reason"])]
        choice = self._model.chat_choice(self._asked, job, done, index)
        delta = {name: text for name in ("reasoning_content", "content") if (text := choice["message"].get(name))}
        said = self._chunk(index, {"delta": delta, "logprobs": choice["logprobs"]}, None)
        return [said, self._chunk(index, {"delta": {}, "logprobs": None}, choice["finish_reason"])]

    def ending(self) -> Iterator[dict[str, Any]]:
        """The chunks after all choices: the numbers of tokens, if requested."""
        if self._asked.stream_usage:
            done = [self._done[index] for index in range(len(self._jobs))]
            yield {**self._head, "choices": [], "usage": usage(self._asked, self._jobs, done)}

    def _chunk(self, index: int, choice: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {**self._head, "choices": [{**choice, "index": index, "finish_reason": reason}]}
