"""Sends requests to an engine that is already working on others, and stores their answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from engine.job import Job
from engine.workers.handing_out.sharing_out import Room
from flexgen_helm.helm.client import FlexGenClient
from flexgen_helm.helm.engines import Observer
from flexgen_helm.helm.requests.asked import Answer, Portion, Work
from flexgen_helm.helm.requests.results import Timing
from flexgen_helm.workers.running_engine import RunningEngine

_CLOSING_S = 0.1
"""Seconds between calls of `close` until an engine that must end has ended."""

Tell = Callable[[list[Answer] | BaseException], None]
_Done = list[tuple[Work, Timing]]


class _Ended:
    """The last message of a portion."""


class Feed:
    """Sends requests to a model's engine in portions and stores its answers in HELM's cache, in threads of its own.

    A context manager. When it is left before everything is answered, as by an interrupt, the engine ends after the
    current sweep, whose answers are stored, too.
    """

    def __init__(self, client: FlexGenClient, observe: Observer, tell: Tell) -> None:
        """`observe` gets the engine's sweeps, in a thread of the engine.

        `tell` is called in another thread: with no answers when the engine is open, with answers as soon as they are
        stored, and last with the error that ended the engine, if any.
        """
        self._engine: RunningEngine | None = None
        self._client = client
        self._observe = observe
        self._tell = tell
        self._is_open = threading.Event()
        self._is_ending = False
        self._done: queue.SimpleQueue[_Done | BaseException | _Ended | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_open = 0
        """Portions that are not answered; used only by the thread that calls `ask`."""
        self._num_ended = 0
        """Portions that have ended; used only by the thread that stores answers."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.put(None)
        while any(thread.is_alive() for thread in self._threads):
            if error is not None or self._is_ending:
                self._is_ending = True
                self._client.close()  # repeatedly, because an engine that is still loading can be closed only later
            for thread in self._threads:
                thread.join(_CLOSING_S)

    def ask(self, works: Sequence[Work], share: float) -> None:
        """Submit requests; the first ones, a `share` of all that there will be, open the engine."""
        portion = Portion(list(works))
        self._num_open += 1
        if self._num_open == 1:
            self._start(self._keep, portion.jobs, share)
        self._start(self._ask, portion)

    @property
    def is_asked(self) -> bool:
        """Whether any request was sent to the engine."""
        return self._num_open > 0

    @property
    def sweep(self) -> Room | None:
        """The work that fills a sweep of a worker; None until the engine is open, or if it does not say."""
        found: Room | None = getattr(self._engine, "sweep", None)
        return found

    @property
    def num_workers(self) -> int:
        """The number of machines that compute sweeps at the same time."""
        return max(1, len(getattr(self._engine, "hosts", ())))

    @property
    def is_open(self) -> bool:
        """Whether the engine is open, so that `sweep` is known if the engine provides it."""
        return self._is_open.is_set()

    def _start(self, do: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=do, args=args, name="flexgen-sweep", daemon=True)
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]
        thread.start()

    def _ask(self, portion: Portion) -> None:
        try:
            self._is_open.wait()
            if not self._is_ending:
                for done in self._client.asking(portion):
                    self._done.put(done)
        except BaseException as error:
            self._done.put(error)
        finally:
            self._done.put(_Ended())

    def _keep(self, first: Sequence[Job], share: float) -> None:
        try:
            with self._client.running(first, share, self._observe) as self._engine, self._client.keeping() as keep:
                self._is_open.set()
                self._tell([])
                for done in self._heard():
                    if done:
                        self._tell(keep(done))
        except BaseException as error:
            self._is_ending = True
            self._is_open.set()
            self._tell(error)

    def _heard(self) -> Iterator[_Done]:
        """Yield the answers that have arrived together; raises an error if no more can come."""
        fault: BaseException | None = None
        is_over = False
        while self._num_ended < self._num_open or not (is_over or fault):
            heard = [self._done.get()]
            while not self._done.empty():
                heard.append(self._done.get())
            done: _Done = []
            for each in heard:
                if isinstance(each, list):
                    done += each
                elif isinstance(each, _Ended):
                    self._num_ended += 1
                elif each is None:
                    is_over = True
                else:
                    fault = fault or each
            yield done
        if fault is not None:
            raise fault
