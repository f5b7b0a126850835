"""What a workload takes under one policy on a profiled machine: seconds of each resource, and bytes of each tier."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import CapacityError
from engine.memory.layout import part_bytes, split_bytes
from engine.memory.tiers import TIERS, Tier, percents
from engine.planning.limits import GATHER_SLOTS, SLOTS
from engine.planning.planner import Plan
from engine.planning.sharing import ALONE, Sharing
from engine.policy import Policy, Share
from flexgen_helm.planning.model_sizes import ModelSizes
from flexgen_helm.planning.overlap import Overlap
from flexgen_helm.planning.roofline import (
    Work,
    Workload,
    cache_rows,
    cached_sequences,
    num_at_once,
    num_off_device,
    states_moved,
    work_of,
)
from flexgen_helm.planning.sizes import Sizes

if TYPE_CHECKING:
    from engine.model.causal_model import CausalModel
    from engine.planning.hardware_profile import HardwareProfile

_CALL_S = 0.7e-3
"""The host's time to launch one layer's work on one micro-batch. 96 resident sequences of OPT-6.7B took 2.04 s, of
which arithmetic explains 0.92 and reading weights, keys and values 0.42; the rest is spread over 31 steps of 32
layers (benchmarks/results/rivals-opt-6.7b.json)."""
_HOST_ATTENTION_CALL_S = 2.5e-3
"""The same time where the host computes attention: it waits for the device before, and the device for it. 64
sequences of OPT-1.3B took 4 ms a layer on an H100, 1.8 of them in the host's attention; 100 of them 7 instead of
4.3."""
_STORE_S = 30e-6
"""The host's time to start the transfer of one sequence's new keys and values of one layer."""
_ELEMENTWISE_PASSES = 26
"""How often operations other than matrix products read or write something as large as a token's hidden state in a
layer, counted in OPT: norms 4, residuals 6, the activation 8 (four times as wide), keys and values 4, attention 4."""
_REQUEST_S = 0.55e-3
"""What a request takes while neither device nor link is busy: it comes, is sampled and leaves. 1000 of them took
OPT-1.3B and OPT-6.7B about that much more than all else here (benchmarks/results/planner-*-choice.json)."""

_WHOLE = ("embedding", "outer")
"""Units that each of several devices has whole."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a workload takes under a policy."""

    policy: Policy
    plan: Plan
    weights: Mapping[Tier, int]
    """Bytes of weights, as stored."""
    held: Mapping[Tier, int]
    """The largest number of bytes without workspace: weights, layers in transit and decoded, keys, values, hidden
    states."""
    at_once: int
    """Sequences that run at once."""
    sweeps: int
    prefill_s: Mapping[str, float]
    """Seconds that each resource needs until every prompt is computed; they work side by side."""
    decode_s: Mapping[str, float]
    """The same for all tokens except the first of each request."""
    between_s: float = 0.0
    """Seconds in which requests come and go, and nothing else is done."""
    hidden_s: float = 0.0
    """Seconds of the transfers of decode steps that pass while prompts are computed, where those come in a few at a
    time."""

    @property
    def seconds(self) -> float:
        """The least time: in each phase, that of the busiest resource; at least that resource's time over both."""
        busiest = max(self.prefill_s[resource] + self.decode_s.get(resource, 0.0) for resource in self.prefill_s)
        left = {**self.decode_s, "to device": self.decode_s["to device"] - self.hidden_s}
        return self.between_s + max(busiest, max(self.prefill_s.values()) + max(left.values()))

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest in the longer phase."""
        phase = max(self.prefill_s, self.decode_s, key=lambda times: max(times.values()))
        return max(phase, key=lambda resource: phase[resource])


def is_host(profile: HardwareProfile) -> bool:
    """Whether the machine has no accelerator, so that the device tier is host memory."""
    return not profile.machine.accelerators


def check_room(load: Workload, sizes: Sizes, plan: Plan) -> None:
    """Raise `CapacityError` when no tier holds the keys and values of one sequence."""
    room, needed = max(cache_rows(sizes, plan).values()), load.shared + load.own + load.new - 1
    if load.new > 1 and room < needed:  # one token needs none
        beside = f" beside {sizes.state_bytes / 1e6:.1f} MB of states" if sizes.state_bytes else ""
        raise CapacityError(
            f"the KV cache has room for {room} tokens{beside} on its largest tier, and a sequence has {needed}; "
            "give it more memory (gpu-memory, cpu-memory, or an offload-dir)"
        )


def estimate(
    model: CausalModel | ModelSizes,
    profile: HardwareProfile,
    load: Workload,
    policy: Policy,
    plan: Plan,
    sharing: Sharing = ALONE,
) -> Estimate:
    """The time of `load` under a plan; `CapacityError` when that has no space for one of its sequences.

    Several devices that share the weights compute an equal part each; figures are those of one device.
    """
    numbers, load = ModelSizes.of(model), load.part_of(sharing.count)
    sizes = numbers.placed(placed_bytes(numbers, policy, plan.weights, sharing), policy)
    sizes = replace(sizes, sweep_bytes=numbers.placed(placed_bytes(numbers, policy, plan.weights), policy).sweep_bytes)
    if sharing.count > 1 and profile.links_together_bytes_s is not None:
        profile = replace(profile, to_device_bytes_s=profile.links_together_bytes_s)
    check_room(load, sizes, plan)
    crosses = not policy.cpu_cache_compute
    whole = work_of(load, sizes, plan, cache_crosses=crosses)
    prefill = work_of(replace(load, new=1), sizes, plan)
    at_once, limits = num_at_once(load, sizes, plan), plan.limits
    decode = Work(
        sweeps=whole.sweeps - prefill.sweeps,
        flop=whole.flop - prefill.flop,
        to_device_bytes=whole.to_device_bytes - prefill.to_device_bytes,
        from_device_bytes=states_moved(load, sizes, plan),  # what prompts keep leaves while those are computed
        device_bytes=whole.device_bytes - prefill.device_bytes,
    )
    prefill = replace(prefill, from_device_bytes=whole.from_device_bytes - decode.from_device_bytes)
    batches = (
        math.ceil(load.prefill_tokens / limits.rows_per_batch),
        decode.sweeps * math.ceil(at_once / min(limits.sequences_per_batch, limits.rows_per_batch)),
    )
    asking = (
        _CALL_S * batches[0] + _STORE_S * num_off_device(load, sizes, plan),
        (_CALL_S if crosses else _HOST_ATTENTION_CALL_S) * batches[1],
    )
    calls = [0.0 if is_host(profile) else sizes.num_layers * seconds for seconds in asking]
    decode_s = resource_seconds(decode, profile, at_once, sizes.disk_bytes) | {"host": calls[1]}
    prefill_s = resource_seconds(prefill, profile, limits.rows_per_batch, sizes.disk_bytes) | {"host": calls[0]}
    if sharing.gather and profile.gather_bytes_s is not None:
        stored = numbers.coded[policy.compress_weight, policy.compress_cache].stored
        split = sum(size for name, size in stored.items() if name not in _WHOLE)
        gather_s = split * (sharing.count - 1) / sharing.count / profile.gather_bytes_s
        prefill_s["card to card"], decode_s["card to card"] = prefill.sweeps * gather_s, decode.sweeps * gather_s
    pass_s = sizes.num_layers * _ELEMENTWISE_PASSES * sizes.hidden_row_bytes / profile.device_bytes_s
    prefill_s["arithmetic"] += pass_s * load.prefill_tokens
    decode_s["arithmetic"] += pass_s * load.num_requests * (load.new - 1)
    sweeps, hidden_s = whole.sweeps, 0.0
    overlap = _overlap(load, sizes, plan, profile, max(prefill_s.values()), decode)
    if overlap is not None:  # who comes in later leaves later
        sweeps = max(sweeps, math.ceil(overlap.houses) * load.new + overlap.sweeps - 1)
        decode_s["to device"] += (sweeps - whole.sweeps) * overlap.weights_s
        hidden_s = min(overlap.hidden_s, decode_s["to device"])
    if not crosses:
        attended = work_of(load, sizes, plan).to_device_bytes - whole.to_device_bytes
        decode_s |= _host_attention(attended, decode.to_device_bytes, decode_s, profile, policy)
    weights, held = room_taken(numbers, load, policy, plan, sharing)
    return Estimate(
        policy=policy,
        plan=plan,
        weights=weights,
        held=held,
        at_once=at_once,
        sweeps=sweeps,
        prefill_s=prefill_s,
        decode_s=decode_s,
        between_s=0.0 if is_host(profile) else _REQUEST_S * load.num_requests,
        hidden_s=hidden_s,
    )


def room_taken(
    sizes: ModelSizes, load: Workload, policy: Policy, plan: Plan, sharing: Sharing = ALONE
) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Bytes by tier of weights, and of all that is held at the fullest, as in `Estimate`."""
    units = placed_bytes(sizes, policy, plan.weights, sharing)
    placed = sizes.placed(units, policy)
    weights: dict[Tier, int] = {tier: sum(tiers[tier] for tiers in units.values()) for tier in TIERS}
    coded = sizes.coded[policy.compress_weight, policy.compress_cache]
    largest = coded.shape.apart_bytes if plan.experts_apart else max(coded.stored.values())
    in_transit = GATHER_SLOTS * largest if sharing.gather else SLOTS * largest if placed.streamed_bytes else 0
    expanded = coded.shape.expanded_bytes if plan.expands_whole else coded.shape.least_expanded_bytes
    taken = weights | {"device": weights["device"] + in_transit + expanded}
    return weights, _held(load, placed, plan, taken, num_at_once(load, placed, plan))


def _held(load: Workload, sizes: Sizes, plan: Plan, weights: Mapping[Tier, int], at_once: int) -> dict[Tier, int]:
    """`weights`, those in transit included, and keys, values and hidden states."""
    held = dict(weights)
    prefixes = min(load.num_runs, math.ceil(at_once / load.num_jobs))
    rows, spans = at_once * load.kept + prefixes * load.shared, at_once + prefixes
    for tier, room in cache_rows(sizes, plan).items():
        there = min(rows, room)
        held[tier] += there * (sizes.device_cache_row_bytes if tier == "device" else sizes.cache_row_bytes)
        rows -= there
    for tier, room in cached_sequences(load.kept, sizes, plan).items() if load.kept else ():
        there = min(spans, room)
        held[tier] += there * sizes.state_bytes
        spans -= there
    hidden = min(plan.limits.rows_per_sweep, load.prefill_tokens) * sizes.hidden_row_bytes
    for tier, percent in percents(plan.activations).items():
        held[tier] += round(hidden * percent / 100) if tier != "device" else 0  # those are computed with
    return held


def _overlap(
    load: Workload, sizes: Sizes, plan: Plan, profile: HardwareProfile, prefill_s: float, decode: Work
) -> Overlap | None:
    """How prompts enter between decode steps; None where all that fit enter at once."""
    admission, at_once = plan.limits.admission, num_at_once(load, sizes, plan)
    if admission is None or load.new == 1:
        return None
    streamed = decode.sweeps * sizes.streamed_bytes
    states = states_moved(load, sizes, plan)
    cached = (decode.to_device_bytes - streamed - states) / decode.sweeps / sizes.cache_row_bytes  # of a full house
    most = admission.most_rows(round(cached))
    if most is None:
        return None
    most = min(most, plan.limits.rows_per_sweep)
    sweeps = math.ceil(at_once / max(1, int(most * load.num_requests / load.prefill_tokens)))
    full_s = cached * sizes.cache_row_bytes / profile.to_device_bytes_s
    return Overlap(
        sweeps=sweeps,
        houses=load.num_requests / at_once,
        prefill_s=prefill_s,
        weights_s=sizes.streamed_bytes / profile.to_device_bytes_s,
        cache_s=full_s * min(1.0, load.new / sweeps),
    )


def _host_attention(
    attended: float, streamed: float, others: Mapping[str, float], profile: HardwareProfile, policy: Policy
) -> dict[str, float]:
    """The seconds of attention on the host over so many bytes, while so many are streamed to the device.

    Host and device wait for each other in every layer; host memory serves attention and the link, so that attention is
    slower while the link is busy.
    """
    dtype = profile.dtype if policy.dtype == "auto" else policy.dtype
    alone, beside = profile.host_attention_bytes_s[dtype], profile.host_attention_beside_copy_bytes_s[dtype]
    waiting = max(others["arithmetic"], others["device memory"], others["host"])
    busy = min(attended / beside, others["to device"])
    return {
        "host attention": busy + (attended - busy * beside) / alone + waiting,
        "host memory": (attended + streamed) / profile.host_bytes_s + waiting,
    }


def placed_bytes(
    sizes: ModelSizes, policy: Policy, share: Share, sharing: Sharing = ALONE
) -> dict[str, dict[Tier, int]]:
    """Bytes of each unit's weights by tier; of several devices that gather them, what one holds."""
    placed: dict[str, dict[Tier, int]] = {}
    for name, stored in sizes.coded[policy.compress_weight, policy.compress_cache].stored.items():
        is_split = sharing.gather and name not in _WHOLE
        split = split_bytes(part_bytes(stored, sharing.count) if is_split else stored, share)
        placed[name] = {"device": split.device, "host": split.host, "disk": split.disk}
    return placed


def resource_seconds(work: Work, profile: HardwareProfile, rows: int, disk_bytes: int) -> dict[str, float]:
    """The seconds of each resource for `work`, whose products have so many rows."""
    return {
        "arithmetic": work.flop / gemm_rate_at(profile.gemm_flop_s, rows),
        "to device": work.to_device_bytes / profile.to_device_bytes_s,
        "from device": work.from_device_bytes / profile.from_device_bytes_s,
        "device memory": work.device_bytes / profile.device_bytes_s,
        "disk": work.sweeps * disk_bytes / profile.disk_read_bytes_s,
    }


def gemm_rate_at(rates: Mapping[int, float], rows: int) -> float:
    """Operations per second of products of `rows` rows: between measured ones, in proportion on both logarithms."""
    known = sorted(rates)
    at = bisect.bisect_left(known, rows)
    if at == 0:
        return rates[known[0]] * rows / known[0]  # the weights are read as often, for less
    if at == len(known):
        return rates[known[-1]]
    low, high = known[at - 1], known[at]
    part = math.log(rows / low) / math.log(high / low)
    return float(rates[low] * (rates[high] / rates[low]) ** part)
