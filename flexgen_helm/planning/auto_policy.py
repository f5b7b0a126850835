"""Chooses the policy for `auto`: the one with the least estimated time for the given requests on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import ConfigError, EngineError
from engine.job import Job
from engine.planning.gathering import sharing_of
from engine.planning.hardware import available_memory, resolve_device, resolve_dtype
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.planner import Plan
from engine.planning.sharing import Resources, Sharing
from engine.policy import Policy
from engine.schedule.prefix import share_prefixes
from engine.schedule.sequence import Prefix
from engine.schedule.sequence import Sequence as Running
from flexgen_helm.planning.drafts import draft_shape
from flexgen_helm.planning.estimate import Estimate, is_host
from flexgen_helm.planning.model_sizes import ModelSizes
from flexgen_helm.planning.policy_search import best_of, search
from flexgen_helm.planning.roofline import Workload


@dataclass(frozen=True)
class Chosen:
    """A policy for certain requests."""

    policy: Policy
    estimate: Estimate | None
    """The least estimated time under it; None where nothing was searched."""
    note: str
    """A line on how it came about; empty where there was nothing to choose."""


Look = Callable[[Policy], Resources]
"""Finds what a run under a policy may use of this machine; raises `EngineError` where that cannot be found."""


def resources_here(policy: Policy) -> Resources:
    """What a run under `policy` may use of its device, the first of several, as this process finds it."""
    device = resolve_device(policy.device)
    return Resources(memory=available_memory(device, policy.gpu_memory, policy.cpu_memory, policy.offload_dir))


def choose(
    path: str,
    dtype: str,
    policy: Policy,
    jobs: Sequence[Job],
    look: Look = resources_here,
    share: float = 1.0,
) -> Chosen:
    """`policy` with the places of weights, and whether devices gather them, chosen for work of the model in `path`.

    `jobs` are a `share` of that work, and what else comes is taken to be like them.

    What it says itself stays; all does on a machine whose device is the host, where nothing is known of it, and where
    the model is in stages.
    Compression is never chosen: codes that change results are the user's choice, and lossless ones are written to the
    cache, as large as the model, and may turn out not to fit its numbers when they are encoded.
    """
    if not jobs or policy.stages > 1:
        return Chosen(policy, None, "")
    try:
        found = look(policy)
    except EngineError:  # the engine will say it, with its own numbers
        return Chosen(policy, None, "")
    is_placed = policy.weights is not None or policy.kv_cache is not None
    is_open = policy.gather_weights is None and found.sharing.gather
    device = resolve_device(policy.device)
    if device == "cpu" or (is_placed and not is_open):
        return Chosen(policy, None, "")
    try:
        profile = HardwareProfile.load()
    except ConfigError as error:
        return Chosen(policy, None, "" if is_placed else f"auto: placed by rule; {error}")
    load = None if is_host(profile) else workload_of(jobs)
    if load is None:
        return Chosen(policy, None, "")
    if share < 1.0:
        load = replace(load, num_runs=math.ceil(load.num_runs / share))
    import torch

    from engine.model.causal_model import CausalModel

    try:
        dtype = resolve_dtype(policy.dtype, dtype, device)
        model = CausalModel(Path(path), getattr(torch, dtype), torch.device("cpu"))
        sizes = ModelSizes.of(model)
        sharing = sharing_of(policy, found, sizes.shape_under(policy), profile)
        if is_open:
            policy = replace(policy, gather_weights=sharing.gather)
        if is_placed:
            return Chosen(policy, None, "")
        draft = draft_shape(policy, dtype, path)
        fitting = search(sizes, profile, found.memory, load, policy, compress=False, sharing=sharing, draft=draft)
        best = best_of(fitting)
    except EngineError:
        return Chosen(policy, None, "")
    places = [_on_devices(best.plan, sharing)]
    places += [f"{best.plan.weights.disk:g} % on disk"] if best.plan.weights.disk else []
    places += ["attention on the host"] if best.policy.cpu_cache_compute and not policy.cpu_cache_compute else []
    count = len(jobs) if share == 1.0 else f"about {math.ceil(len(jobs) / share)}"
    note = f"auto: {', '.join(places)}; at least {best.seconds:.1f} s for {count} requests, bound by {best.bottleneck}"
    return Chosen(best.policy, best, note)


def _on_devices(plan: Plan, sharing: Sharing) -> str:
    percent = f"{plan.weights.gpu:g} %"
    if sharing.count == 1:
        return f"{percent} of the weights on the device"
    if sharing.gather:
        return f"{percent} of its part of the weights on each of {sharing.count} devices, which gather them"
    return f"{percent} of the weights on each of {sharing.count} devices"


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
