"""Finds the policy under which a workload takes the least time on a profiled machine, by estimating all of them.

There are few choices: whole percents of the weights on the device, and the bits of codes. The engine's own planner says
what each choice leaves for the KV cache and for micro-batches: nothing is relaxed or rounded afterwards.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from engine.errors import CapacityError
from engine.planning.hardware import Memory, memory_within
from engine.planning.model_shape import ModelShape
from engine.planning.planner import make_plan
from engine.planning.sharing import ALONE, Sharing, WeightBytes
from engine.policy import Bits, Policy, Share, WeightCodes
from flexgen_helm.planning.estimate import Estimate, estimate, is_host
from flexgen_helm.planning.model_sizes import ModelSizes
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine.model.causal_model import CausalModel
    from engine.planning.hardware_profile import HardwareProfile

_HOST_ATTENTION_GAIN = 0.9
"""The largest time of attention on the host, relative to the best other policy, with which it is chosen: its
estimate is the least reliable."""
_UNSURE = 0.05
"""Estimates that differ by less say nothing of which policy is faster."""
_BITS: tuple[Bits, ...] = (None, 8, 4)


def memory_of(profile: HardwareProfile, base: Policy, disk_bytes: int) -> Memory:
    """What a run may use of a profiled machine, within the limits of `base`; warns where these exceed it."""
    if base.cpu_memory is not None and base.cpu_memory > profile.host_memory_bytes:
        warnings.warn(
            f"cpu-memory {base.cpu_memory / 1e9:.1f} GB exceeds the {profile.host_memory_bytes / 1e9:.1f} GB of host "
            "memory in the hardware profile: planned with it all the same",
            stacklevel=2,
        )
    return memory_within(
        profile.host_memory_bytes,
        None if is_host(profile) else profile.device_memory_bytes,
        disk_bytes if base.offload_dir is not None else 0,
        base.gpu_memory,
        base.cpu_memory,
    )


def search(
    model: CausalModel | ModelSizes,
    profile: HardwareProfile,
    memory: Memory,
    load: Workload,
    base: Policy,
    *,
    compress: bool,
    lossless: bool = False,
    sharing: Sharing = ALONE,
    draft: ModelShape | None = None,
) -> list[Estimate]:
    """All policies that fit, the fastest first; of equal ones, the one that changes fewest numbers comes first.

    `base` has the settings that are not searched: memory limits, directories, and with `compress` false, the bits of
    codes. lossless: whether to search lossless codes of weights, if `base` names none; `compress` includes them.
    sharing: of several devices that share the weights. draft: of the policy's draft model, whose memory is reserved;
    how much it saves is not known beforehand. Raises `CapacityError`, with what is missing, when none fits.
    """
    sizes = ModelSizes.of(model)
    found: list[Estimate] = []
    tight: list[Estimate] = []
    reason: CapacityError | None = None
    cache_bits = _BITS if compress and sizes.can_encode_cache else (base.compress_cache,)
    weight_codes = _weight_codes(sizes, base, compress=compress, lossless=lossless)
    places = (False,) if is_host(profile) else (base.cpu_cache_compute, True)
    # Of one token nothing is kept that could be attended to; and where attention is computed changes an answer's bits.
    places = places if load.new > 1 and not base.batch_invariant else places[:1]
    for weight, cache, on_host in product(weight_codes, cache_bits, dict.fromkeys(places)):
        if (weight, None) not in sizes.coded:
            raise CapacityError(sizes.not_encoded(weight))
        if (weight, cache) not in sizes.coded:
            raise CapacityError(f"compress-cache: no codec takes this model's keys and values in {cache} bits")
        shape = sizes.coded[weight, cache].shape
        for share in _shares(shape, memory, base, sharing):
            policy = replace(
                base, compress_weight=weight, compress_cache=cache, weights=share, cpu_cache_compute=on_host
            )
            try:
                plan = make_plan(shape, policy, memory, on_cpu=is_host(profile), sharing=sharing, draft=draft)
                (tight if plan.is_tight else found).append(estimate(sizes, profile, load, policy, plan, sharing))
            except CapacityError as error:
                reason = reason or error
    found = found or tight  # the device may run out of memory, but there is nothing better
    if not found:
        assert reason is not None
        raise reason
    return sorted(
        found,
        key=lambda each: (
            round(each.seconds, 3),
            _changes(each.policy),
            each.policy.cpu_cache_compute,
            -each.plan.weights.gpu,
        ),
    )


def _weight_codes(sizes: ModelSizes, base: Policy, *, compress: bool, lossless: bool) -> list[WeightCodes]:
    """Codes of weights to choose from."""
    if not sizes.can_encode_weights or not (compress or (lossless and base.compress_weight is None)):
        return [base.compress_weight]
    exact: list[WeightCodes] = ["lossless"] if sizes.can_encode_lossless else []
    return [None, *exact, *(_BITS[1:] if compress else ())]


def best_of(found: list[Estimate]) -> Estimate:
    """The one to take of the policies that `search` found.

    With attention on the host only if it is faster by far, and with lossless weights if by more than estimates are
    wrong; then, of those that are about as fast as the best of their kind, the one with the largest micro-batches: what
    an estimate leaves out grows with their number.
    """
    best = found[0]
    others = [each for each in found if not each.policy.cpu_cache_compute]
    if others and best.seconds > _HOST_ATTENTION_GAIN * others[0].seconds:
        best = others[0]
    plain = [each for each in found if _without_codes(each) == _without_codes(best) and not each.policy.compress_weight]
    if best.policy.compress_weight == "lossless" and plain and plain[0].seconds <= (1 + _UNSURE) * best.seconds:
        best = plain[0]  # nothing has to be encoded
    alike = [each for each in found if _kind(each) == _kind(best) and each.seconds <= (1 + _UNSURE) * best.seconds]
    return max(alike, key=lambda each: (each.plan.limits.rows_per_batch, each.plan.activations.gpu, -each.seconds))


def _without_codes(found: Estimate) -> tuple[object, ...]:
    return found.policy.cpu_cache_compute, found.policy.compress_cache


def _kind(found: Estimate) -> tuple[object, ...]:
    policy = found.policy
    return policy.cpu_cache_compute, policy.compress_weight, policy.compress_cache, found.plan.uses_disk


def _shares(shape: ModelShape, memory: Memory, base: Policy, sharing: Sharing) -> list[Share | None]:
    """Every whole percent of the weights on the device, and how much of the rest fits the host; the remainder: disk.

    None leaves the shares to the planner, where host memory is too small and there is no disk: it raises the error.
    """
    if base.weights is not None:
        return [base.weights]
    host = min(100, math.floor(100 * memory.host / WeightBytes(shape, sharing).on_host(100)))
    shares: list[Share | None] = []
    for gpu in range(101):
        cpu = min(100 - gpu, host)
        if cpu == 100 - gpu or base.offload_dir is not None:
            shares.append(Share(gpu=gpu, cpu=cpu, disk=100 - gpu - cpu))
    return shares or [None]


def _changes(policy: Policy) -> int:
    """How lossy the codes are, for the order of equally fast policies."""
    return sum(16 - bits for bits in (policy.weight_bits, policy.compress_cache) if bits)
