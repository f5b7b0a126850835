"""The throughput of the driver of many hosts: driver, ledger and HELM's cache file are real, hosts are simulated.

    python -m benchmarks.scale_driver --hosts 1000 --requests 10000000

Hosts have a simulated clock: each takes as long for a sweep as its tokens say, and some die, fall silent or leave.
Requests are submitted run by run and their answers stored as in a suite, with as many in flight. Checks that each is
stored once, and reports answers per second, the driver's memory, and how well hosts were used.
"""

from __future__ import annotations

import argparse
import queue
import resource
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helm.common.cache import SqliteCacheConfig

from benchmarks.made_hosts import IDENTITY, RUN, TOKENS_S, Setting, World
from engine.asking.front import Front
from engine.asking.pending import Call
from engine.errors import EngineError
from engine.hosts.driver import Driver
from engine.hosts.expected import Expected
from engine.hosts.messages import Opening
from engine.job import Job
from engine.policy import Policy
from engine.workers.packing import PackedJobs
from flexgen_helm.helm.batcher import Done
from flexgen_helm.helm.feeding import Feed
from flexgen_helm.helm.request_cache import RequestCache
from flexgen_helm.helm.requests.asked import Answer, Portion, Work
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
LOOK_S = 5.0
SLACK = 20
"""Sweeps whose answers may wait at the driver while simulated time goes on: few compared with those in flight."""
SWEEPS_UNDER_WAY = 3
"""Sweeps in flight per host, as in a sweep of a suite."""


class Asked(Front):
    """Gives the driver the interface of an engine, like `HostsEngine` but with a simulated clock."""

    policy = Policy()
    window = None
    vocab_size = 100_000
    pad_token = 0

    def __init__(self, world: World) -> None:
        self._driver = Driver(
            Opening(model="made", policy=self.policy, jobs=PackedJobs.of([])),
            world,
            expected=Expected(identity=dict(IDENTITY), versions={}),
            clock=lambda: world.clock.now,
        )
        self._driver.trust(None)
        self._world = world
        self._look()

    def _look(self) -> None:
        self._driver.look()
        self._world.clock.at(LOOK_S, self._look)

    def _submit(self, call: Call) -> None:
        self._driver.submit(call)

    def _abandon(self, call: Call) -> None:
        self._driver.abandon(call)

    def close(self) -> None:
        """Close without waiting for hosts."""
        self._driver.close(wait_s=0)


class Client:
    """The part of a client that `Feed` uses: the driver, and HELM's cache."""

    def __init__(self, engine: Front, path: Path) -> None:
        self._engine, self._config = engine, SqliteCacheConfig(str(path))

    def asking(self, portion: Portion) -> Iterator[list[tuple[Work, Any]]]:
        """See `FlexGenClient.asking`."""
        for finished in self._engine.sweeps(portion.take_jobs()):
            yield portion.done([Done(index=index, completion=done, seconds=1.0) for index, done in finished])

    @contextmanager
    def running(self, jobs: Sequence[Job], share: float, observe: Any) -> Iterator[None]:
        """See `FlexGenClient.running`."""
        yield None

    @contextmanager
    def keeping(self) -> Iterator[Callable[[Iterable[tuple[Work, Any]]], list[Answer]]]:
        """See `FlexGenClient.keeping`."""
        with RequestCache(self._config) as cache:

            def keep(done: Iterable[tuple[Work, Any]]) -> list[Answer]:
                answers = [Answer.of(work, _response(work)) for work, _ in done]
                cache.put(
                    ({**answer.work.key, "identity": IDENTITY}, answer.outcome)
                    for answer in answers
                    if isinstance(answer.outcome, dict)
                )
                return answers

            yield keep

    def close(self) -> None:
        """See `FlexGenClient.close`."""
        self._engine.close()


def _response(work: Work) -> dict[str, Any] | EngineError:
    done = work.completions[0]
    if done.error is not None:
        return done.error
    tokens = [{"text": done.text, "logprob": done.logprobs[0]}]
    text = {"text": done.text, "tokens": tokens, "logprob": done.logprobs[0], "finish_reason": "length"}
    return {"completions": [text], "request_time": 1.0, "request_datetime": 1_700_000_000, "batch_size": 100}


def _move_on(world: World, told: Counter[str], is_full: threading.Event, is_over: threading.Event) -> None:
    """Advance simulated time while enough work is in flight and the driver keeps up, which takes no simulated time."""
    while not is_over.is_set():
        behind = world.tally.delivered - told["answers"]
        if is_full.wait(0.1) and behind <= (SLACK * world.setting.sweep if world.tally.busy else 0):
            world.clock.step()
        else:
            time.sleep(0.0002)


def simulate(setting: Setting, path: Path) -> dict[str, Any]:
    """Answer all requests, and check that each answer is stored once."""
    world, told, is_full, is_over = World(setting), Counter[str](), threading.Event(), threading.Event()
    inbox: queue.SimpleQueue[list[Answer] | BaseException] = queue.SimpleQueue()
    before, engine = _rss(), Asked(world)
    mover = threading.Thread(target=_move_on, args=(world, told, is_full, is_over), daemon=True)
    mover.start()
    most, step = SWEEPS_UNDER_WAY * setting.hosts * setting.sweep, max(setting.sweep, RUN)
    begun, begun_s, making_s, number = time.perf_counter(), time.process_time(), 0.0, 0
    with Feed(Client(engine, path), lambda running, timing: None, inbox.put) as feed:
        while told["answers"] < setting.requests:
            while number < setting.requests and number - told["answers"] < most:
                start, end = time.thread_time(), min(number + step, setting.requests)
                works = [setting.work(each) for each in range(number, end)]
                making_s += time.thread_time() - start
                feed.ask(works, 1.0)
                number = end
            is_full.set()
            answers = inbox.get()
            is_full.clear()
            if isinstance(answers, BaseException):
                raise answers
            told["answers"] += len(answers)
            told["failed"] += sum(isinstance(answer.outcome, EngineError) for answer in answers)
    seconds, processor_s, peak = time.perf_counter() - begun, time.process_time() - begun_s, _rss()
    is_over.set()
    is_full.set()
    mover.join()
    engine.close()
    connection = sqlite3.connect(path)
    ((kept,),) = connection.execute("SELECT COUNT(*) FROM unnamed").fetchall()
    connection.close()
    if kept + told["failed"] != setting.requests:
        raise RuntimeError(f"{kept} of {setting.requests} requests are in the cache")
    tally = world.tally
    return {
        **asdict(setting),
        "answers": setting.requests,
        "failed": told["failed"],
        "seconds": seconds,
        "processor_s": processor_s,
        "making_s": making_s,
        "being_hosts_s": tally.made_s,
        "answers_s": setting.requests / (seconds - making_s - tally.made_s),
        "answers_processor_s": setting.requests / (processor_s - making_s - tally.made_s),
        "bytes_before": before,
        "bytes_at_most": peak,
        "bytes_of_texts": min(most, setting.requests) * setting.text_bytes,
        "cache_bytes": path.stat().st_size,
        "losses": dict(tally.losses),
        "sweeps": tally.sweeps,
        "computed_again": tally.jobs - setting.requests,
        "hosts_s": world.clock.now,
        "hosts_used": setting.least_s / world.clock.now,
        "tokens_over_least": tally.tokens / (setting.least_s * TOKENS_S * setting.hosts),
    }


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--sweep", type=int, default=100, help="requests that a host's sweep takes")
    parser.add_argument("--shared", type=int, default=400, help="tokens of a prompt that a run has in common")
    parser.add_argument("--own", type=int, default=100, help="tokens of a prompt besides")
    parser.add_argument("--loss", type=float, default=0.005, help="how likely a host is lost in a sweep")
    parser.add_argument("--folder", type=Path, help="where HELM's cache file is, meanwhile")
    parser.add_argument("--name", default="scale-driver", help="of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args(arguments)
    names = ("hosts", "requests", "sweep", "shared", "own", "loss")
    setting = Setting(**{name: getattr(options, name) for name in names})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = simulate(setting, Path(folder) / "cache.sqlite")
    for name, value in found.items():
        print(f"{name:>18} {value:,.2f}" if isinstance(value, float) else f"{name:>18} {value}")
    print(write_record(options.name, found, options.out))


if __name__ == "__main__":
    main()
