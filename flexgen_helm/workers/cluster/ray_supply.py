"""Starts workers on a Ray cluster, replaces those that die, and passes their messages to the driver."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, one_line
from engine.hosts.expected import why_other_versions
from engine.hosts.host import Host, Loss
from engine.hosts.messages import Opening
from engine.hosts.serving import Running
from flexgen_helm.workers.cluster.actor import HostActor
from flexgen_helm.workers.cluster.ray_host import HEARING, RayHost, how_ended
from flexgen_helm.workers.cluster.room import told_room
from flexgen_helm.workers.cluster.slots import Node, Slot, Wanted, nodes_of, slots_of

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Longest wait for messages, in seconds, before other tasks are looked at."""
_NODES_S = 5.0
"""Seconds between checks for machines that have joined or left the cluster."""
_SAY_S = 60.0
"""Seconds between notices that workers wait for room; the first one comes after `_SAY_FIRST_S`."""
_SAY_FIRST_S = 10.0
_MOST_DEATHS = 3
"""Workers that may end in one place in a row before one has completed a sweep."""


@dataclass(eq=False)
class _Coming:
    """A worker that was started and has not answered yet."""

    actor: Any
    slot: Slot
    place: int


class RaySupply:
    """Implements `Supply` over Ray.

    One thread hears workers; another one asks the cluster for its machines, which takes as long as its head is away.
    """

    def __init__(
        self,
        ray: Any,
        wanted: Wanted,
        versions: Mapping[str, str],
        open_engine: Callable[[Opening], Running],
    ) -> None:
        """`open_engine` is called on the hosts, so it must be a function of a module that all of them have installed.

        `versions` are those that every host must have.
        """
        self._ray, self._wanted, self._versions = ray, wanted, versions
        self._actors = ray.remote(concurrency_groups={HEARING: 1})(HostActor)
        self._open_engine = open_engine
        self._lock = threading.RLock()
        self._coming: dict[Any, _Coming] = {}
        """Workers that were started, by the reference of their `hello`."""
        self._hearing: dict[Any, RayHost] = {}
        """Hosts by the reference of their current `hear`."""
        self._hosts: dict[RayHost, int] = {}
        """The driver's hosts, and the place of each."""
        self._deaths: Counter[int] = Counter()
        """Deaths in a row, by place."""
        self._places = itertools.count()
        self._served_nodes: set[str] = set()
        self._gone: list[str] = []
        """Why workers were not replaced."""
        self._closing = threading.Event()

    def begin(self, join: Callable[[Host], None], fail: Callable[[EngineError], None]) -> None:
        """See `Supply.begin`."""
        self._join, self._fail = join, fail
        self._say_at = time.monotonic() + _SAY_FIRST_S
        nodes = self._nodes()
        with self._lock:
            self._start_wanted(nodes)
        for name, step in (("flexgen-ray", self._hear), ("flexgen-machines", self._look)):
            threading.Thread(target=self._run, args=(step,), name=name, daemon=True).start()

    def lost(self, host: Host, loss: Loss) -> bool:
        """See `Supply.lost`."""
        assert isinstance(host, RayHost)
        with self._lock:
            place = self._hosts.pop(host, None)
            if place is None or self._closing.is_set():
                return False
            self._deaths[place] = 0 if loss.has_swept else self._deaths[place] + 1
            slot = host.slot
            is_there = slot.node is None or self._has(slot.node)
            is_hopeless = loss.kind == "refused" or self._deaths[place] >= _MOST_DEATHS
            if is_there and not is_hopeless and not (loss.kind == "left" and slot.node is not None):
                self._start(slot, place)
                return True
            self._gone.append(f"{host.name}: {loss.why}")
            error = self._none_left()
        if error is not None:
            self._fail(error)
        return False

    def close(self) -> None:
        """See `Supply.close`."""
        with self._lock:
            self._closing.set()
            for coming in self._coming.values():
                self._ray.kill(coming.actor)
            for host in self._hosts:
                host.kill()
            self._coming.clear()
            self._hearing.clear()
            self._hosts.clear()

    def _nodes(self) -> list[Node]:
        return nodes_of(self._ray.nodes())

    def _has(self, node: str) -> bool:
        """Whether the cluster has a machine; yes where it does not say: a worker that finds none comes back."""
        try:
            return any(each.id == node for each in self._nodes())
        except Exception:
            return True

    def _start_wanted(self, nodes: Sequence[Node]) -> None:
        """Start the workers that were asked for, or those of machines that have joined."""
        slots = slots_of(self._wanted, nodes)
        new = [slot for slot in slots if slot.node is None or slot.node not in self._served_nodes]
        if self._wanted.workers is not None and self._served_nodes:
            return
        for slot in new:
            self._start(slot, next(self._places))
        self._served_nodes |= {slot.node or "any" for slot in new}

    def _start(self, slot: Slot, place: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._closing.is_set():  # nobody would end it before the command ends
            return
        strategy = "SPREAD" if slot.node is None else NodeAffinitySchedulingStrategy(slot.node, soft=False)
        options = {"num_gpus": slot.gpus, "num_cpus": slot.cpus, "scheduling_strategy": strategy}
        actor = self._actors.options(max_restarts=0, max_task_retries=0, **options).remote(self._open_engine)
        self._coming[actor.hello.remote()] = _Coming(actor, slot, place)

    def _run(self, step: Callable[[], None]) -> None:
        while not self._closing.is_set():
            try:
                step()
            except Exception as error:  # nobody would hear the workers any more
                if not self._closing.is_set():
                    self._fail(EngineError(f"the connection to the cluster is lost: {one_line(error)}"))
                return

    def _look(self) -> None:
        """Start workers on machines that are new, let those leave whose machines go, and say who has not come."""
        if self._closing.wait(_NODES_S):
            return
        nodes = self._nodes()
        with self._lock:
            self._start_wanted(nodes)
            slots = [coming.slot for coming in self._coming.values()]
            is_empty = not self._served_nodes
        if time.monotonic() >= self._say_at and (slots or is_empty):
            self._say_at = time.monotonic() + _SAY_S
            _log.warning("%s: %s", _waiting(slots), told_room(self._ray))
        self._tell_drained()

    def _hear(self) -> None:
        with self._lock:
            references = [*self._coming, *self._hearing]
        if not references:
            self._closing.wait(_LOOK_S)
            return
        # What is ready is on this machine: a machine that falls silent while it is read from would silence all others.
        ready, _ = self._ray.wait(references, num_returns=1, timeout=_LOOK_S, fetch_local=True)
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0, fetch_local=True)
        for reference in ready:
            with self._lock:
                host, coming = self._hearing.pop(reference, None), self._coming.pop(reference, None)
            if host is not None:
                host.take(reference)
                self._hear_on(host)
            elif coming is not None:
                self._arrived(coming, reference)

    def _hear_on(self, host: RayHost) -> None:
        with self._lock:
            if not host.is_over and host in self._hosts:
                self._hearing[host.hear()] = host

    def _arrived(self, coming: _Coming, reference: Any) -> None:
        try:
            machine, node, versions = self._ray.get(reference)
        except Exception as error:
            self._never_came(coming, how_ended(error))
            return
        if (why := why_other_versions(self._versions, versions)) is not None:
            self._ray.kill(coming.actor)
            self._never_came(coming, f"{machine}: {why}", for_good=True)
            return
        with self._lock:
            host = RayHost(self._ray, coming.actor, self._name(machine), coming.slot, node)
            self._hosts[host] = coming.place
        self._join(host)
        self._hear_on(host)

    def _name(self, machine: str) -> str:
        """Return the machine's name, numbered if it has several workers."""
        taken = {host.name for host in self._hosts}
        numbered = (machine if number == 1 else f"{machine}-{number}" for number in itertools.count(1))
        return next(name for name in numbered if name not in taken)

    def _never_came(self, coming: _Coming, why: str, *, for_good: bool = False) -> None:
        error = None
        with self._lock:
            self._deaths[coming.place] += 1
            is_last = for_good or self._deaths[coming.place] >= _MOST_DEATHS
            _log.warning("a worker did not start (%s)%s", why, "" if is_last else "; another one is started")
            if is_last:
                self._gone.append(why)
                error = self._none_left()
            else:
                self._start(coming.slot, coming.place)
        if error is not None:
            self._fail(error)

    def _none_left(self) -> EngineError | None:
        """Return the error if no worker is left or can come; machines that may join later are not waited for."""
        if self._hosts or self._coming or self._closing.is_set():
            return None
        return EngineError(f"no worker is left: {'; '.join(dict.fromkeys(self._gone)) or 'all have left'}")

    def _tell_drained(self) -> None:
        """Let workers leave whose machines are being drained, such as preempted spot instances."""
        from ray._private.state import state

        draining = state.get_draining_nodes()
        with self._lock:
            hosts = [host for host in self._hosts if host.node in draining and not host.is_leaving]
        for host in hosts:
            host.be_drained()


def _waiting(slots: Sequence[Slot]) -> str:
    """Who has not come yet: for want of room, or because it takes time to start."""
    if not slots:
        return "no machine is there yet for a worker (a cluster that grows needs --workers N)"
    if len(slots) == 1:
        return f"a worker of {slots[0]} has not started yet"
    return f"{len(slots)} workers of {slots[0]} each have not started yet"
