"""A Ray cluster of this machine whose workers sleep in place of computing: `python ray_session.py`; prints JSON.

A program of its own, since Ray leaves threads and handlers in the process that uses it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

from ray_processes import MARK, workers_of
from sleeping_engine import answer, open_sleeping

from engine.errors import EngineError
from engine.hosts.expected import Expected
from engine.hosts.hosts_engine import HostsEngine
from engine.hosts.messages import Opening
from engine.job import Job
from engine.policy import Policy
from engine.workers.packing import PackedJobs
from flexgen_helm.workers.cluster.connection import connect
from flexgen_helm.workers.cluster.ray_supply import RaySupply
from flexgen_helm.workers.cluster.room import check_room
from flexgen_helm.workers.cluster.slots import Wanted
from flexgen_helm.workers.cluster.versions import versions


def opened(ray: Any, workers: int, own: dict[str, str]) -> HostsEngine:
    """An engine on so many workers, of which each must have these versions."""
    return opened_on(ray, Wanted(workers=workers), own)


def opened_on(ray: Any, wanted: Wanted, own: dict[str, str]) -> HostsEngine:
    """An engine on these workers, of which each must have these versions."""
    supply = RaySupply(ray, wanted, own, open_sleeping)
    opening = Opening(model="none", policy=Policy(), jobs=PackedJobs.of([]))
    expected = Expected(identity={"dtype": "float32"}, versions=versions())
    return HostsEngine(opening, supply, expected, path="", digest=lambda: None)


def main() -> None:
    """Lose a worker, refuse one, and find no room."""
    mark = os.environ[MARK]
    ray = connect("local", 2)
    jobs = [Job(prompt=(at % 3, *range(100, 150), at), max_new_tokens=2) for at in range(600)]
    found: dict[str, Any] = {}
    with opened(ray, 2, versions()) as engine:
        killed = threading.Event()

        def kill_one(timing: Any) -> None:
            if len(workers := workers_of(mark)) == 2 and len(engine.hosts) == 2 and not killed.is_set():
                killed.set()
                os.kill(workers[0], signal.SIGKILL)

        engine.observer = kill_one
        while not killed.is_set() or not found:
            done = engine.run(jobs)
            found["is_right"] = [each.text for each in done] == [answer(job).text for job in jobs]
        found["deaths"], found["given_up"] = list(engine.deaths), dict(engine.given_up)
        found["devices"] = sorted(engine.devices)
    for name, ask in (
        ("refused", lambda: opened(ray, 1, {**versions(), "flexgen-helm": "0.0"})),
        ("no_room", lambda: check_room(ray, Wanted(workers=500))),
    ):
        try:
            ask()
        except EngineError as error:
            found[name] = str(error)
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main()
