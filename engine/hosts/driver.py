"""The driver of many hosts: leases jobs to hosts as they need work, and leases them again when a host is lost."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from engine.asking.pending import Call
from engine.errors import CapacityError, EngineError, named, one_line
from engine.hosts.expected import Expected, why_other_weights
from engine.hosts.host import Host, Loss, LossKind, Supply
from engine.hosts.messages import HostOpened, HostSwept, HostTells, Leaving, Opening, Vouched
from engine.hosts.standing import Standing
from engine.job import Completion
from engine.schedule.timing import SweepTiming
from engine.workers.handing_out.ledger import Ledger
from engine.workers.messages import Done, Entered, Fault, Note
from engine.workers.packing import PackedJobs

_log = logging.getLogger(__name__)

SILENCE_S = 60.0
"""Seconds without a message after which a host counts as lost, and its jobs go to other hosts."""
_STRIKES = 5
"""Losses of hosts that a job takes part in before it is suspected: a host itself isolates a job that ends its engine,
and is lost through power, preemption or network failures."""
_LOOK_S = 2.0
"""Longest interval, in seconds, between two checks for silent hosts."""


class Driver:
    """Leases jobs to hosts, which may join and leave at any time, until all jobs are answered.

    A host leases as many jobs as its next sweeps take; the lease ends when the host dies, leaves, or is silent for too
    long. The first answer to each job counts. Hosts whose model, settings or versions differ from the driver's are
    refused, with the difference named.
    """

    def __init__(
        self,
        opening: Opening,
        supply: Supply,
        *,
        expected: Expected,
        observe: Callable[[SweepTiming], None] = lambda timing: None,
        silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Have every host that `supply` brings open the model of `opening`; returns at once.

        `expected` is what every host must have in common with the driver; `trust` supplies the digest of the weights.
        `observe` is called after each sweep, before its completions are delivered, in a thread of the host, with the
        device named "host/device". A host that sends nothing for `silence_s` seconds of `clock` is lost.
        """
        self.deaths: list[str] = []  # how each host was lost
        self.given_up: dict[str, str] = {}  # hosts that are not replaced: name -> why
        self._opening, self._supply, self._observe = opening, supply, observe
        self._expected, self._silence_s, self._clock = expected, silence_s, clock
        self._changed = threading.Condition(threading.RLock())
        self._hosts: dict[int, Standing] = {}
        self._numbers = itertools.count()
        policy = opening.policy
        does_share = policy.share_prefix and policy.pad_to_seq_len is None
        self._ledger = Ledger(0, share_prefix=does_share, strikes=_STRIKES)
        self._opened: HostOpened | None = None
        self._fault: BaseException | None = None
        self._is_closing = self._is_digested = False
        self._digest: str | None = None
        self._last_look = clock()
        self._told: set[str] = set()
        supply.begin(self.join, self.fail)
        threading.Thread(target=self._watch, name="flexgen-hosts", daemon=True).start()

    # Called by the engine

    def wait_until_open(self) -> HostOpened:
        """Wait until a host has opened the model; returns what that host reported, or raises why none will."""
        with self._changed:
            while self._opened is None:
                self._check_serving()
                self._changed.wait()
            return self._opened

    @property
    def hosts(self) -> tuple[tuple[str, HostOpened], ...]:
        """The hosts that are open now: their names and what they reported about their engines."""
        with self._changed:
            return tuple((each.host.name, each.opened) for each in self._hosts.values() if each.opened is not None)

    def submit(self, call: Call) -> None:
        """Accept a call, whose jobs are in `left`; raises the driver's error if it has failed or is closed."""
        with self._changed:
            self._check_serving()
            self._ledger.add(call, call.left)
            self._feed(self._hosts.values())

    def abandon(self, call: Call) -> None:
        """Cancel everything unfinished of a call."""
        with self._changed:
            call_number = self._ledger.drop(call)
            if call_number is not None:
                for each in self._hosts.values():
                    each.host.drop(call_number)
                self._feed(self._hosts.values())

    def close(self, wait_s: float = 300.0) -> None:
        """Let hosts end after the current sweep, whose completions are delivered; calls that still wait fail."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            for each in list(self._hosts.values()):
                self._part(each)
            until = time.monotonic() + wait_s
            # After a fault nobody waits for answers, and hosts may be out of reach.
            while self._hosts and self._fault is None and (left_s := until - time.monotonic()) > 0:
                self._changed.wait(left_s)
            for each in list(self._hosts.values()):
                each.host.kill()
                del self._hosts[each.number]
        self._supply.close()
        self.fail(EngineError("the engine was closed while this job was waiting"))

    def trust(self, digest: str | None) -> None:
        """Set the digest of the driver's weights; then refuse hosts with other weights, and use the others' answers."""
        with self._changed:
            self._digest, self._is_digested = digest, True
            for each in list(self._hosts.values()):
                self._compare(each)

    # Called by the supply of hosts

    def join(self, host: Host) -> None:
        """Add a host; may be called at any time."""
        with self._changed:
            if self._is_closing or self._fault is not None:
                host.kill()
                return
            standing = Standing(next(self._numbers), host, self._clock())
            self._hosts[standing.number] = standing
            self._ledger.join(standing.number)
        host.open(self._opening, partial(self._take, standing), partial(self._ended, standing))

    def fail(self, fault: BaseException) -> None:
        """Fail all calls that are waiting; the driver accepts no more."""
        with self._changed:
            self._fault = self._fault or fault
            calls = self._ledger.clear()
            self._changed.notify_all()
        for call in calls:
            call.put(fault)

    def look(self) -> None:
        """Give up hosts that have been silent for too long; called every few seconds."""
        with self._changed:
            now, before = self._clock(), self._last_look
            self._last_look = now
            if now - before > self._silence_s / 2:  # this process itself was suspended
                for each in self._hosts.values():
                    each.last_heard = now
            for each in list(self._hosts.values()):
                if now - each.last_heard > self._silence_s:
                    self._lose(each, "died", f"nothing was heard of it for {self._silence_s:.0f} s")

    def _watch(self) -> None:
        with self._changed:
            while self._hosts or not (self._is_closing or self._fault):
                self._changed.wait(_LOOK_S)
                self.look()

    # Messages of hosts, in any thread

    def _take(self, host: Standing, told: HostTells) -> None:
        with self._changed:
            if host.number not in self._hosts:
                return  # it was given up
            host.last_heard = self._clock()
        if isinstance(told, HostSwept):
            name = f"{host.host.name}/{told.timing.device}"
            try:
                self._observe(replace(told.timing, begun=time.perf_counter() - told.ago_s, device=name))
            except Exception as error:  # else nobody would read the host's messages
                self.fail(EngineError(f"the observer of sweeps failed: {named(error)}"))
        with self._changed:
            if host.number not in self._hosts:
                return
            if isinstance(told, Done):
                if host.is_trusted:
                    self._deliver(told.completions.unpack())
                    self._feed([host])
                else:
                    host.unused.append(told.completions)
            elif isinstance(told, Entered):
                self._ledger.entered(told.numbers.tolist())
                self._feed([host])
            elif isinstance(told, HostSwept):
                host.has_swept = True
            elif isinstance(told, HostOpened):
                self._take_opened(host, told)
            elif isinstance(told, Vouched):
                host.digest, host.has_vouched = told.digest, True
                self._compare(host)
            elif isinstance(told, Leaving):
                _log.warning("worker %s leaves after the sweep at hand: %s", host.host.name, told.why)
                host.last_words = told.why
                self._part(host)
            elif isinstance(told, Note):
                self._note(host, told)
            elif isinstance(told, Fault):
                self._take_fault(host, told.error)
            self._changed.notify_all()

    def _take_opened(self, host: Standing, told: HostOpened) -> None:
        if (why := self._expected.why_refused(told)) is not None:
            self._lose(host, "refused", why)
            return
        host.opened = told
        self._opened = self._opened or told
        _log.info("worker %s is open on %s", host.host.name, ", ".join(told.devices))
        self._feed([host])

    def _compare(self, host: Standing) -> None:
        """Use the answers of a host if its weights are the driver's; refuse the host if they are not."""
        if not (host.has_vouched and self._is_digested) or host.is_trusted:
            return
        if (why := why_other_weights(self._digest, host.digest)) is not None:
            self._lose(host, "refused", why)
            return
        host.is_trusted = True
        unused, host.unused = host.unused, []
        for completions in unused:
            self._deliver(completions.unpack())
        self._feed([host])

    def _take_fault(self, host: Standing, error: BaseException) -> None:
        host.last_words = one_line(error)
        if isinstance(error, EngineError) and type(error) not in (EngineError, CapacityError):
            self._lose(host, "refused", host.last_words)  # raised on purpose: another process there would say the same
        else:  # a process that has just ended there may still hold memory
            self._lose(host, "died", host.last_words)

    def _note(self, host: Standing, note: Note) -> None:
        if note.level >= logging.WARNING and note.text not in self._told:
            self._told.add(note.text)  # what all hosts log is logged once
            logging.getLogger(note.logger or __name__).log(note.level, "%s: %s", host.host.name, note.text)

    def _ended(self, host: Standing, how: str) -> None:
        with self._changed:
            if host.number in self._hosts:
                self._lose(host, "left" if host.is_leaving else "died", host.last_words or how)

    # Consequences

    def _check_serving(self) -> None:
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        if self._is_closing:
            raise EngineError("the engine is closed")

    def _feed(self, hosts: Iterable[Standing]) -> None:
        """Lease jobs to hosts that need some; the lock is held."""
        able = {each.number: each for each in hosts if each.may_be_asked and each.number in self._hosts}
        if self._fault is None and able and not self._is_closing:
            for number, asked in self._ledger.to_send({number: each.room for number, each in able.items()}).items():
                for call, jobs in asked.items():
                    able[number].host.ask(call, PackedJobs.of(jobs))

    def _deliver(self, done: Iterable[tuple[int, Completion]]) -> None:
        for call, results in self._ledger.answered(done):
            call.put(results)

    def _part(self, host: Standing) -> None:
        """Let a host end after the current sweep."""
        if not host.is_leaving:
            host.is_leaving = True
            host.host.leave()

    def _lose(self, host: Standing, kind: LossKind, why: str) -> None:
        """Continue without a host: its unanswered jobs go to the others."""
        del self._hosts[host.number]
        host.host.kill()
        failed = self._ledger.died([host.number], is_job_at_fault=kind == "died")
        self._ledger.give_up(host.number)
        self._changed.notify_all()
        if self._is_closing:
            return
        loss = Loss(kind=kind, why=why, has_swept=host.has_swept)
        is_replaced = self._supply.lost(host.host, loss)
        _log.warning("worker %s %s", host.host.name, loss.told(is_replaced=is_replaced))
        if kind == "died":
            self.deaths.append(f"{host.host.name}: {why}")
        if not is_replaced and kind != "left":
            self.given_up[host.host.name] = why
        error = EngineError(f"computing this request ended its worker each time, at last alone ({why})")
        self._deliver((number, Completion(error=error)) for number in failed)
        self._feed(self._hosts.values())
