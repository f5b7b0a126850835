"""A Ray cluster of two nodes on this machine, one of which is drained at work: `python ray_drained.py`; prints JSON.

A program of its own, since Ray leaves threads and handlers in the process that uses it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from typing import Any

from ray_session import opened_on
from sleeping_engine import answer

from engine.job import Job
from flexgen_helm.workers.cluster.slots import Wanted
from flexgen_helm.workers.cluster.versions import versions

WAIT_S = 120.0


def main() -> None:
    """Drain one of two machines, with notice, while both compute; go on asking until its worker has left."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        os.environ["RAY_TMPDIR"] = folder  # so that nobody's `auto` finds this cluster
        print(json.dumps(_drained()))


def _drained() -> dict[str, Any]:
    import ray
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    drained = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    jobs = [Job(prompt=(at % 3, *range(100, 150), at), max_new_tokens=2) for at in range(600)]
    found: dict[str, Any] = {"is_right": True}
    until = time.monotonic() + WAIT_S
    with opened_on(ray, Wanted(), versions()) as engine:
        while len(engine.hosts) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        found["machines"] = len(engine.hosts)

        def drain() -> None:
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            gcs = GcsClient(address=cluster.gcs_address)
            found["accepted"], _ = gcs.drain_node(drained.node_id, reason, "taken back", int(time.time() + 60) * 1000)

        threading.Timer(1.0, drain).start()
        while len(engine.hosts) == 2 and time.monotonic() < until:
            done = engine.run(jobs)
            found["is_right"] &= [each.text for each in done] == [answer(job).text for job in jobs]
        found |= {"left": len(engine.hosts), "deaths": list(engine.deaths), "given_up": dict(engine.given_up)}
    ray.shutdown()
    cluster.shutdown()
    return found


if __name__ == "__main__":
    main()
