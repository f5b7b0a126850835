"""Opens models on the machines of a Ray cluster, for commands with `--ray`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.description import describe
from engine.checkpoint.identity.result import identity_beside_weights
from engine.checkpoint.identity.weight_digest import weights_digest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.errors import JobError
from engine.hosts.expected import Expected
from engine.hosts.hosts_engine import HostsEngine
from engine.hosts.messages import Opening
from engine.hosts.serving import Running
from engine.job import Job
from engine.policy import Policy
from engine.workers.packing import PackedJobs
from flexgen_helm.workers.cluster.connection import connect
from flexgen_helm.workers.cluster.host_engine import open_host
from flexgen_helm.workers.cluster.ray_supply import RaySupply
from flexgen_helm.workers.cluster.room import check_room
from flexgen_helm.workers.cluster.slots import Wanted
from flexgen_helm.workers.cluster.versions import versions

_MOST_TOKENS = 1 << 18
"""Most prompt tokens of the sample of jobs that hosts get for the choice of a policy."""


class RayCluster:
    """A Ray cluster that runs engines; connected to on construction."""

    def __init__(
        self,
        address: str = "",
        wanted: Wanted | None = None,
        *,
        wait: bool = True,
        open_engine: Callable[[Opening], Running] = open_host,
    ) -> None:
        """`address`: see `connect`. `wait`: whether to wait until the cluster has room for the `wanted` workers.

        Raises `EngineError` if the cluster cannot be reached, or has no room and `wait` is False.
        """
        self._wanted, self._open_engine = wanted or Wanted(), open_engine
        self._wanted.check()
        self._ray: Any = connect(address, self._wanted.workers)
        self._engines: list[HostsEngine] = []
        atexit.register(self.close)
        if not wait:
            check_room(self._ray, self._wanted)

    def load(
        self, model: str, policy: Policy, window: int | None = None, jobs: Sequence[Job] = (), share: float = 1.0
    ) -> HostsEngine:
        """Open a model on all workers; returns when the first one has opened it.

        `jobs` are a `share` of those to come. Raises `EngineError` if no worker can open the model.
        """
        path = describe(model).path
        model = os.path.abspath(model) if os.path.exists(model) else model
        source = OpenedWeights(Path(path))
        expected = Expected(identity=identity_beside_weights(model, policy), versions=versions())
        supply = RaySupply(self._ray, self._wanted, versions(), self._open_engine)
        opening = Opening(
            model=model, policy=policy, window=window, jobs=PackedJobs.of(_some(jobs)), share=min(1.0, share)
        )

        def digest() -> str | None:
            try:
                found = weights_digest(Path(path), source)
                source.check()
                return found
            finally:
                source.close()

        engine = HostsEngine(opening, supply, expected, path=path, digest=digest)
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        """Close the engines and leave the cluster, which ends if it was started here."""
        for engine in self._engines:
            engine.close()
        self._ray.shutdown()


def _some(jobs: Sequence[Job]) -> list[tuple[int, Job]]:
    """Return the first valid jobs, with their indices."""
    tokens, some = 0, []
    for number, job in enumerate(jobs):
        try:
            job.check()
        except JobError:  # the job fails alone when it is run
            continue
        tokens += len(job.prompt)
        if tokens > _MOST_TOKENS:
            break
        some.append((number, job))
    return some
