"""What `auto` means for the requests at hand: the policy with the least estimated time on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import ConfigError, EngineError
from engine.job import Job
from engine.planning.hardware import Memory, available_memory, resolve_device, resolve_dtype
from engine.planning.hardware_profile import HardwareProfile
from engine.policy import Policy
from engine.schedule.prefix import share_prefixes
from engine.schedule.sequence import Prefix
from engine.schedule.sequence import Sequence as Running
from flexgen_helm.planning.estimate import Estimate, is_host
from flexgen_helm.planning.policy_search import best_of, search
from flexgen_helm.planning.roofline import Workload


@dataclass(frozen=True)
class Chosen:
    """A policy for certain requests."""

    policy: Policy
    estimate: Estimate | None
    """What they take under it at least; None where nothing was searched."""
    note: str
    """A line on how it came about; empty where there was nothing to choose."""


def memory_for(policy: Policy) -> Memory:
    """What memory a run under `policy` may use, as this process finds it."""
    device = resolve_device(policy.device)
    return available_memory(device, policy.gpu_memory, policy.cpu_memory, policy.offload_dir)


def choose(
    path: str,
    dtype: str,
    policy: Policy,
    jobs: Sequence[Job],
    memory: Callable[[Policy], Memory] = memory_for,
    share: float = 1.0,
) -> Chosen:
    """`policy` with the places of weights chosen for work of the model in directory `path`.

    `jobs` are a `share` of that work, and what else comes is taken to be like them.

    As it is where it says them itself, on a machine whose device is the host, and where nothing is known of it.
    Compression is never chosen: it changes results.
    """
    load = workload_of(jobs)
    if load is not None and share < 1.0:
        load = replace(load, num_runs=math.ceil(load.num_runs / share))
    if policy.weights is not None or policy.kv_cache is not None or load is None:
        return Chosen(policy, None, "")
    device = resolve_device(policy.device)
    if device == "cpu":
        return Chosen(policy, None, "")
    try:
        profile = HardwareProfile.load()
    except ConfigError as error:
        return Chosen(policy, None, f"auto: placed by rule; {error}")
    if is_host(profile):
        return Chosen(policy, None, "")
    import torch

    from engine.model.causal_model import CausalModel

    try:
        found = memory(policy)
        model = CausalModel(Path(path), getattr(torch, resolve_dtype(policy.dtype, dtype, device)), torch.device("cpu"))
        best = best_of(search(model, profile, found, load, policy, compress=False))
    except EngineError:  # the engine will say it, with its own numbers
        return Chosen(policy, None, "")
    weights = best.plan.weights
    places = [f"{weights.gpu:g} % of the weights on the device"]
    places += [f"{weights.disk:g} % on disk"] if weights.disk else []
    places += ["attention on the host"] if best.policy.cpu_cache_compute and not policy.cpu_cache_compute else []
    count = len(jobs) if share == 1.0 else f"about {math.ceil(len(jobs) / share)}"
    note = f"auto: {', '.join(places)}; at least {best.seconds:.1f} s for {count} requests, bound by {best.bottleneck}"
    return Chosen(best.policy, best, note)


def workload_of(jobs: Sequence[Job]) -> Workload | None:
    """About what `jobs` are: as many prefixes as they share, of the mean length, and the mean request; None for none.

    Prompt tokens to compute, requests, and tokens to generate are as many as those of `jobs`, but for rounding up.
    """
    return workload_of_shared(shared_sequences(jobs))


def workload_of_shared(sequences: Sequence[Running]) -> Workload | None:
    """`workload_of` what `shared_sequences` has made of jobs."""
    if not sequences:
        return None
    prefixes: dict[int, Prefix] = {id(prefix): prefix for each in sequences for prefix in each.chain}
    groups = len({id(each.parent) for each in sequences if each.parent is not None}) or 1
    count = len(sequences)
    return Workload(
        num_runs=groups,
        num_jobs=math.ceil(count / groups),
        shared=math.ceil(sum(len(prefix.tokens) for prefix in prefixes.values()) / groups),
        own=max(1, math.ceil(sum(each.num_rows for each in sequences) / count)),
        new=max(1, math.ceil(sum(each.job.max_new_tokens for each in sequences) / count)),
    )


def shared_sequences(jobs: Sequence[Job]) -> list[Running]:
    """What the engine makes of `jobs` that can be run: each continues the prefixes that it shares."""
    return share_prefixes(sequence for job in jobs if (sequence := _running(job)) is not None)


def _running(job: Job) -> Running | None:
    try:
        job.check()
        return Running.of(job)
    except EngineError:  # it fails alone, when it is run
        return None
