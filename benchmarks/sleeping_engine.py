"""An engine without a model: a sweep sleeps in proportion to its rows, so that several engines need no cores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from engine.asking.front import Front
from engine.asking.pending import Call, Pending
from engine.errors import EngineError
from engine.hosts.messages import HostOpened, Opening
from engine.hosts.serving import Running
from engine.job import Completion, Job
from engine.policy import Policy
from engine.schedule.timing import SweepTiming
from engine.workers.handing_out.sharing_out import Room
from flexgen_helm.workers.cluster.versions import versions

ROWS, JOBS = 4096, 64
"""Rows and jobs of a sweep."""
ROW_S = 1e-4
"""Seconds for each row of a prompt."""
VOCABULARY = 50_000


def answer(job: Job) -> Completion:
    """The answer to a job: the prompt's last tokens, reversed."""
    tokens = tuple(job.prompt)[: -job.max_new_tokens - 1 : -1] if job.max_new_tokens else ()
    return Completion(text=str(tokens), tokens=tokens, logprobs=(-1.0,) * len(tokens), finish_reason="length")


class SleepingEngine(Front):
    """Runs jobs like `engine.Engine`, in a thread that sleeps."""

    window, vocab_size, pad_token = None, VOCABULARY, 0

    def __init__(self) -> None:
        self.policy = Policy()
        self.observer: Callable[[SweepTiming], None] | None = None
        self._waiting: list[tuple[Call, int, Job]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sweeps_of_checked(self, jobs: Iterable[Job], entered: Callable[[list[int]], None]) -> Pending:
        pending = Pending(dict(enumerate(jobs)), [], self._abandon, entered)
        self._submit(pending.call)
        return pending

    def weights_digest(self) -> None:
        """Return None: there are no weights."""

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _submit(self, call: Call) -> None:
        with self._changed:
            self._waiting += [(call, index, job) for index, job in call.left.items()]
            self._changed.notify_all()

    def _abandon(self, call: Call) -> None:
        with self._changed:
            self._waiting = [each for each in self._waiting if each[0] is not call]

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closing:
                    self._changed.wait()
                if self._is_closing:
                    waiting, self._waiting = self._waiting, []
                    break
                sweep, rows = [], 0
                while self._waiting and len(sweep) < JOBS and rows < ROWS:
                    sweep.append(self._waiting.pop(0))
                    rows += len(sweep[-1][2].prompt)
            by_call: dict[int, tuple[Call, list[tuple[int, Completion]]]] = {}
            for call, index, job in sweep:
                by_call.setdefault(id(call), (call, []))[1].append((index, answer(job)))
            for call, done in by_call.values():
                call.begin([index for index, _ in done])
            begun = time.perf_counter()
            time.sleep(rows * ROW_S)
            if self.observer is not None:
                self.observer(_timing(begun, rows, len(sweep)))
            for call, done in by_call.values():
                call.put(done)
        for left in {id(call): call for call, _, _ in waiting}.values():
            left.put(EngineError("the engine was closed while this job was waiting"))


def _timing(begun: float, rows: int, count: int) -> SweepTiming:
    seconds = time.perf_counter() - begun
    return SweepTiming(
        begun=begun,
        host_s=0.0,
        sweep_s=seconds,
        load_s=0.0,
        link_s=0.0,
        prefill_rows=rows,
        decode_rows=0,
        num_sequences=count,
        new_tokens=count,
        device="cpu",
    )


def open_sleeping(opening: Opening) -> Running:
    """Open this engine in a worker, whatever model is named."""
    opened = HostOpened(
        devices=("cpu",),
        versions=versions(),
        identity={"dtype": "float32"},
        window=None,
        vocab_size=VOCABULARY,
        pad_token=0,
        sweep=Room(rows=ROWS, jobs=JOBS),
    )
    return Running(engine=SleepingEngine(), opened=opened, check=lambda: None)
