"""Computes experts for several micro-batches at once: the forwards of a layer wait for each other at the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Semaphore, Thread

import torch
from torch import nn

from engine.memory import accelerator
from engine.model.sweep_context import SweepContext

_Experts = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _GivenUp(BaseException):
    """Ends a forward that waits in vain; a BaseException, so that no model code catches it."""


@dataclass(eq=False)
class _Question:
    """The arguments with which a forward calls the registered experts function."""

    module: nn.Module
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    found: torch.Tensor | None = None


class _Forward:
    """A call in a thread of its own, which runs only while the controlling thread waits for it."""

    def __init__(self, call: Callable[[], None], device: torch.device) -> None:
        self.asked: _Question | None = None
        """The call that it waits for; None before it starts and after it ends."""
        self._going, self._waiting = Semaphore(0), Semaphore(0)
        self._error: BaseException | None = None
        self._is_given_up = False
        self._thread = Thread(target=self._run, args=(call, device), name="flexgen-forward", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Return when it waits for experts, or has ended; raises its exception."""
        self._going.release()
        self._waiting.acquire()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # which has this frame, and what the forward held

    def ask(self, question: _Question) -> torch.Tensor:
        """Called by the forward: wait for the experts' result."""
        self.asked = question
        self._waiting.release()
        self._going.acquire()
        self.asked = None
        if self._is_given_up:
            raise _GivenUp
        assert question.found is not None
        return question.found

    def end(self) -> None:
        """Wait until the thread has ended; a forward that waits is abandoned."""
        self._is_given_up = True
        self._going.release()
        self._thread.join()

    def _run(self, call: Callable[[], None], device: torch.device) -> None:
        self._going.acquire()
        try:
            if not self._is_given_up:
                accelerator.make_current(device)
                with torch.no_grad():
                    call()
        except _GivenUp:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._waiting.release()


class JointExperts:
    """Makes forwards of a layer wait until all of them call their experts, and computes those for all rows at once.

    So experts that are stored encoded are decoded once for all of them. One thread runs at a time: shared data need no
    locks. Each thread has torch's default state, except for the device and `no_grad`.
    """

    def __init__(self, context: SweepContext, experts: _Experts, device: torch.device) -> None:
        """context: the sweep context, which routes experts to this object while there are several calls."""
        self._context, self._experts, self._device = context, experts, device
        self._current: _Forward | None = None

    def run(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all calls, in any interleaving; raises the exception of one, and abandons the others."""
        if len(calls) == 1:
            calls[0]()
            return
        forwards: list[_Forward] = []
        self._context.ask_experts = self.ask
        try:
            for call in calls:
                forwards.append(_Forward(call, self._device))
            going = forwards
            while going:
                for forward in going:
                    self._current = forward
                    forward.go_on()
                going = [forward for forward in going if forward.asked is not None]
                self._answer([forward.asked for forward in going if forward.asked is not None])
        finally:
            self._current = self._context.ask_experts = None
            for forward in forwards:
                forward.end()

    def ask(self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' result for the rows of the calling forward; it waits for the others."""
        assert self._current is not None
        batch = self._context.batch
        found = self._current.ask(_Question(module, hidden, index, weights))
        self._context.batch = batch
        return found

    def _answer(self, questions: Sequence[_Question]) -> None:
        for module in dict.fromkeys(question.module for question in questions):
            asked = [question for question in questions if question.module is module]
            rows = [len(question.hidden) for question in asked]
            given = (torch.cat([getattr(each, name) for each in asked]) for name in ("hidden", "index", "weights"))
            for question, found in zip(asked, self._experts(module, *given).split(rows), strict=True):
                question.found = found
