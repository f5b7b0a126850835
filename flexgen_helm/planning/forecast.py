"""Predicts requests before they are run: tokens, time, transferred bytes, and space on every tier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, UnsupportedError
from engine.job import Job
from engine.memory.tiers import TIERS, Tier
from engine.planning.gathering import sharing_of
from engine.planning.hardware import Memory, resolve_device, resolve_dtype
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.model_shape import ModelShape
from engine.planning.planner import Plan, make_plan
from engine.planning.sharing import Resources, Sharing
from engine.policy import Policy
from engine.schedule.cutting import padded_length
from engine.schedule.sequence import Sequence as Running
from flexgen_helm.planning.auto_policy import Look, resources_here, shared_sequences, workload_of_shared
from flexgen_helm.planning.drafts import draft_shape
from flexgen_helm.planning.estimate import check_room, estimate, is_host, placed_bytes, room_taken
from flexgen_helm.planning.model_sizes import ModelSizes
from flexgen_helm.planning.policy_search import best_of, memory_of, search
from flexgen_helm.planning.roofline import Workload, work_of

REACHED = 0.9
"""The approximate part of the limit's rate that sweeps have reached on GPUs (0.86 to 0.99, benchmarks/results)."""
_DISK = 10**12
"""Bytes of room on the disk of a machine that is known by its profile only."""
_NAMES: Mapping[Tier, str] = {"device": "GPU", "host": "host memory", "disk": "disk"}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of all requests together."""

    prompt: int
    """The prompt tokens of requests, shared ones counted for each."""
    computed: int
    """The prompt tokens that the layers compute: a shared prefix once, padding included."""
    generated: int
    """The most tokens to generate."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a model's requests take under a policy on a machine. Bytes are those of the whole, of all devices."""

    requests: int
    tokens: Tokens
    policy: Policy
    plan: Plan
    """The plan of each device."""
    devices: int
    """The number of devices, which compute a part of the requests each."""
    sweeps: int
    """The least number of passes over the layers, on the busiest device."""
    to_device_bytes: float
    """Over the link: weights, keys and values, hidden states; 0 where the device is the host."""
    from_device_bytes: float
    disk_bytes: float
    """Weights read from disk."""
    weights: Mapping[Tier, int]
    held: Mapping[Tier, int]
    """The largest number of bytes without workspace; on the device tier, like `weights`, of each device."""
    draft_bytes: int
    """Weights of the draft model, on each device; 0 without one."""
    memory: Memory
    """What may be used: `device` of each device."""
    on_host: bool
    """Whether the device is the host."""
    seconds: float | None
    """The least seconds, without loading; None where the machine's rates are not known."""
    bottleneck: str
    """What is busy longest; why the time is not known, where it is not."""

    def as_mapping(self) -> dict[str, Any]:
        """The forecast's numbers, for JSON."""
        told = ("requests", "sweeps", "to_device_bytes", "from_device_bytes", "disk_bytes", "seconds", "bottleneck")
        numbers = {name: getattr(self, name) for name in told}
        return {**numbers, **asdict(self.tokens), "weights": dict(self.weights), "held": dict(self.held)}


def _tokens(runnable: Sequence[Running], policy: Policy) -> Tokens:
    """The engine computes shared prefixes once, unless the policy pads or does not share."""
    pad = policy.pad_to_seq_len
    if _shares(policy):
        prefixes = {id(prefix): prefix for each in runnable for prefix in each.chain}
        computed = sum(len(prefix.tokens) for prefix in prefixes.values()) + sum(each.num_rows for each in runnable)
    else:
        rows = (len(each.job.prompt) - (each.job.max_new_tokens == 0) for each in runnable)
        computed = sum(padded_length(max(1, number), pad) for number in rows)
    return Tokens(
        prompt=sum(len(each.job.prompt) for each in runnable),
        computed=computed,
        generated=sum(each.job.max_new_tokens for each in runnable),
    )


def _shares(policy: Policy) -> bool:
    return policy.pad_to_seq_len is None and policy.share_prefix


def forecast_of(
    path: str,
    dtype: str,
    policy: Policy,
    jobs: Sequence[Job],
    profile: HardwareProfile | None = None,
    look: Look = resources_here,
    *,
    has_weights: bool = True,
) -> Forecast | None:
    """What `jobs` of the model in directory `path`, of number format `dtype`, take; None where nothing can be run.

    On this machine, of which `look` says what may be used, or on one device of the one of `profile`. Where the policy
    leaves the places open, they are those that the engine takes: the best found where the machine's rates are known,
    else those of the planner's rule. Loads no weights; without `has_weights` their files need not be there.
    Raises `EngineError` for a model that cannot be run, `CapacityError` where the policy has no room on the machine.
    """
    if policy.stages > 1:
        raise UnsupportedError(f"stages {policy.stages}: what requests take of a model in stages is not forecast")
    runnable = shared_sequences(jobs)
    load, tokens = workload_of_shared(runnable), _tokens(runnable, policy)
    if load is None:
        return None
    if not _shares(policy):
        load = Workload(1, len(runnable), 0, math.ceil(tokens.computed / len(runnable)), load.new)
    if profile is None:
        device = resolve_device(policy.device)
        found = look(policy)
        dtype, on_host, why = resolve_dtype(policy.dtype, dtype, device), device == "cpu", ""
        try:
            profile = HardwareProfile.load()
        except ConfigError as error:
            why = str(error)
        if profile is not None and is_host(profile) != on_host:
            profile, why = None, f"the machine's profile is not of the device {device}"
    else:
        found = Resources(memory=memory_of(profile, policy, _DISK))
        on_host, why = is_host(profile), ""
        dtype = profile.computed_in(policy.dtype, dtype)
    sizes = _sizes(path, dtype, has_weights=has_weights)
    sharing = sharing_of(policy, found, sizes.shape_under(policy), None if on_host else profile)
    draft = draft_shape(policy, dtype, path, has_weights=has_weights)
    policy, plan, seconds, bottleneck = _placed(
        sizes, policy, found.memory, load, profile, sharing, draft, on_host=on_host
    )
    load, devices = load.part_of(sharing.count), sharing.count
    placed = sizes.placed(placed_bytes(sizes, policy, plan.weights, sharing), policy)
    work = work_of(load, placed, plan, cache_crosses=not policy.cpu_cache_compute)
    weights, held = _of_all(*room_taken(sizes, load, policy, plan, sharing), sharing)
    return Forecast(
        requests=len(jobs),
        tokens=tokens,
        policy=policy,
        plan=plan,
        devices=devices,
        sweeps=work.sweeps,
        to_device_bytes=0.0 if on_host else devices * work.to_device_bytes,
        from_device_bytes=0.0 if on_host else devices * work.from_device_bytes,
        disk_bytes=float(devices * work.sweeps * placed.disk_bytes),
        weights=weights,
        held=held,
        draft_bytes=0 if draft is None else draft.weight_bytes,
        memory=found.memory,
        on_host=on_host,
        seconds=seconds,
        bottleneck=bottleneck or why,
    )


def _sizes(path: str, dtype: str, *, has_weights: bool) -> ModelSizes:
    import torch

    from engine.model.causal_model import CausalModel

    return ModelSizes.of(CausalModel(Path(path), getattr(torch, dtype), torch.device("cpu"), has_weights=has_weights))


def _placed(
    sizes: ModelSizes,
    policy: Policy,
    memory: Memory,
    load: Workload,
    profile: HardwareProfile | None,
    sharing: Sharing,
    draft: ModelShape | None,
    *,
    on_host: bool,
) -> tuple[Policy, Plan, float | None, str]:
    """The policy with its places, its plan, seconds and what bounds them, as far as rates are known."""
    is_open = policy.weights is None and policy.kv_cache is None
    if is_open and profile is not None and not on_host:  # as `auto_policy.choose`
        best = best_of(search(sizes, profile, memory, load, policy, compress=False, sharing=sharing, draft=draft))
        return best.policy, best.plan, best.seconds, best.bottleneck
    plan = make_plan(sizes.shape_under(policy), policy, memory, on_cpu=on_host, sharing=sharing, draft=draft)
    if profile is None:
        check_room(load, sizes.placed(placed_bytes(sizes, policy, plan.weights), policy), plan)
        return policy, plan, None, ""
    found = estimate(sizes, profile, load, policy, plan, sharing)
    return policy, plan, found.seconds, found.bottleneck


def _of_all(
    weights: Mapping[Tier, int], held: Mapping[Tier, int], sharing: Sharing
) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """What each of several devices has, on the host and on disk added up; whole weights lie in host memory once."""
    times: dict[Tier, int] = {"device": 1, "host": sharing.count if sharing.gather else 1, "disk": sharing.count}
    all_weights = {tier: times[tier] * weights[tier] for tier in TIERS}
    others = {tier: (1 if tier == "device" else sharing.count) * (held[tier] - weights[tier]) for tier in TIERS}
    return all_weights, {tier: all_weights[tier] + others[tier] for tier in TIERS}


def lines(found: Forecast) -> Iterator[str]:
    """A forecast in a few lines, for people."""
    tokens = found.tokens
    yield (
        f"tokens: {tokens.prompt:,} of prompts, {tokens.computed:,} to compute after sharing; "
        f"at most {tokens.generated:,} to generate"
    )
    if found.seconds is None:
        yield f"time: not known: {found.bottleneck}"
    else:
        least, likely = duration(found.seconds), duration(found.seconds / REACHED)
        yield f"time: {least} at least, about {likely} to be expected, loading aside; bound by {found.bottleneck}"
    link = f"{size(found.to_device_bytes)} to the device, {size(found.from_device_bytes)} back"
    moved = "nothing crosses a link: the device is the host" if found.on_host else f"over the link {link}"
    yield f"bytes: {moved}; {size(found.disk_bytes)} of weights from disk; {found.sweeps:,} passes over the layers"
    yield f"room: {'; '.join(_rooms(found))}"
    if found.plan.draft is not None:
        room = found.plan.draft.cache_budgets["device"]
        yield (
            f"draft model: {size(found.draft_bytes)} of weights and room for {size(room)} of keys and values on "
            "each device in addition; the time does not include what its drafts save"
        )


def _rooms(found: Forecast) -> Iterator[str]:
    rooms = {"device": found.memory.device, "host": found.memory.host, "disk": found.memory.disk}
    if found.memory.shared:  # one memory, whatever the policy calls its parts
        held, weights = (found.devices * each["device"] + each["host"] for each in (found.held, found.weights))
        yield f"memory {size(held)} of {size(rooms['host'])} ({size(weights)} of weights)"
    for tier in TIERS[2:] if found.memory.shared else TIERS:
        if found.held[tier] or tier != "disk":
            told = f"{size(found.held[tier])} of {size(rooms[tier])}"
            each = f"each of {found.devices} GPUs" if tier == "device" and found.devices > 1 else _NAMES[tier]
            yield f"{each} {told} ({size(found.weights[tier])} of weights)"


def duration(seconds: float) -> str:
    """Seconds as people say them: 12.0 s, 3.4 min, 1.2 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    """Bytes as people say them: 0 GB, 12.3 MB, 1.2 TB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB" if number else "0 GB"
