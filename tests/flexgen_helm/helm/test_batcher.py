"""The batcher gathers what arrives together into one call, waits for nobody in vain, and answers everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine import Completion, EngineError, Job
from flexgen_helm.helm.batcher import Answer, Batcher, Done


class Echo:
    """Completes each job with its own prompt, the last one first."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.fault: Exception | None = None
        self.forgets = False

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Done]:
        self.sizes.append(len(jobs))
        for index in reversed(range(len(jobs))):
            if self.fault is not None and index == 0:
                raise self.fault
            if not (self.forgets and index == 0):
                completion = Completion(tokens=tuple(jobs[index].prompt), finish_reason="length")
                yield Done(index=index, completion=completion, seconds=0.5)


def job(number: int) -> Job:
    return Job(prompt=[number])


def ask_from_threads(batcher: Batcher, requests: list[list[Job]]) -> list[Answer]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(batcher.ask, requests))


def test_requests_of_many_threads_become_one_call_and_each_gets_its_own_answer() -> None:
    echo = Echo()
    requests = [[job(10 * n + k) for k in range(n % 3 + 1)] for n in range(16)]
    answers = ask_from_threads(Batcher(echo, quiet_s=0.2), requests)
    assert echo.sizes == [sum(map(len, requests))]
    for asked, answer in zip(requests, answers, strict=True):
        assert [list(completion.tokens) for completion in answer.completions] == [list(each.prompt) for each in asked]
        assert (answer.num_requests, answer.seconds) == (16, 0.5)


def test_a_lone_request_waits_only_for_the_quiet_window() -> None:
    batcher = Batcher(Echo(), quiet_s=0.01, longest_wait_s=10.0)
    started = time.monotonic()
    assert batcher.ask([job(1)]).num_requests == 1
    assert time.monotonic() - started < 1.0


def test_it_waits_for_callers_that_are_on_their_way() -> None:
    echo = Echo()
    batcher = Batcher(echo, quiet_s=0.001, longest_wait_s=10.0)
    announced = threading.Barrier(2)

    def slow() -> None:
        with batcher.arriving():
            announced.wait()
            time.sleep(0.2)
            batcher.ask([job(2)])

    thread = threading.Thread(target=slow)
    thread.start()
    announced.wait()
    with batcher.arriving():
        batcher.ask([job(1)])
    thread.join()
    assert echo.sizes == [2]


def test_it_does_not_wait_for_ever_for_a_caller_that_never_asks() -> None:
    batcher = Batcher(Echo(), quiet_s=0.001, longest_wait_s=0.1)
    with batcher.arriving(), batcher.arriving(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(batcher.ask, [job(1)]).result(timeout=5).num_requests == 1


def test_a_caller_that_leaves_without_asking_is_not_waited_for() -> None:
    batcher = Batcher(Echo(), quiet_s=0.001, longest_wait_s=10.0)
    with batcher.arriving():
        pass  # its answer was in the cache
    started = time.monotonic()
    batcher.ask([job(1)])
    assert time.monotonic() - started < 1.0


def test_a_fault_of_the_engine_reaches_everybody_who_has_no_answer_yet() -> None:
    echo = Echo()
    echo.fault = EngineError("broken")
    batcher = Batcher(echo, quiet_s=0.2)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(batcher.ask, [job(n)]) for n in range(3)]
        errors = [future.exception(timeout=5) for future in futures]
    assert sorted(str(error) for error in errors) == ["None", "None", "broken"]
    echo.fault = None
    assert batcher.ask([job(7)]).completions[0].tokens == (7,)  # and it goes on


def test_an_engine_that_forgets_a_job_leaves_nobody_waiting() -> None:
    echo = Echo()
    echo.forgets = True
    with pytest.raises(EngineError, match="without answering"):
        Batcher(echo).ask([job(1), job(2)])


def test_no_thread_stays_behind() -> None:
    batcher = Batcher(Echo())
    ask_from_threads(batcher, [[job(n)] for n in range(4)])
    deadline = time.monotonic() + 5
    while any(thread.name == "flexgen-batch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
