"""Opens a model on a host as a command on that machine would, with a policy chosen for that machine."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.description import describe
from engine.checkpoint.identity.result import check_beside_weights, identity_beside_weights
from engine.checkpoint.opened_weights import OpenedWeights
from engine.hosts.messages import HostOpened, Opening
from engine.hosts.serving import Running
from engine.workers.handing_out.sharing_out import Room
from flexgen_helm.planning.auto_policy import choose
from flexgen_helm.workers.cluster.versions import versions
from flexgen_helm.workers.engine_processes import engine_processes


def open_host(opening: Opening) -> Running:
    """Open a model on the devices of this process; raises `EngineError` if that fails."""
    description = describe(opening.model)
    beside = identity_beside_weights(opening.model, opening.policy)
    source = OpenedWeights(Path(description.path))
    jobs = [job for _, job in opening.jobs.unpack()]
    look = engine_processes.resources
    chosen = choose(description.path, description.dtype, opening.policy, jobs, look, opening.share)
    engine = engine_processes.load(description.path, chosen.policy, opening.window)
    try:
        source.check_names()
        check_beside_weights(beside, opening.model, opening.policy)
    except BaseException:
        engine.close()
        raise
    limits, count = engine.plan.limits, len(engine.devices)
    opened = HostOpened(
        devices=engine.devices,
        versions=versions(),
        identity=beside,
        window=engine.window,
        vocab_size=engine.vocab_size,
        pad_token=engine.pad_token,
        sweep=Room(rows=count * limits.rows_per_sweep, jobs=count * limits.seats),
        plan=engine.plan,
    )
    return Running(engine=engine, opened=opened, check=source.check)
