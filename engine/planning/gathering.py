"""Decides whether several devices gather weights from each other, or each transfers all of them (pure)."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import CapacityError
from engine.planning.hardware import Memory
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.model_shape import ModelShape
from engine.planning.planner import make_plan
from engine.planning.sharing import Resources, Sharing
from engine.policy import Policy


def sharing_of(policy: Policy, found: Resources, shape: ModelShape, profile: HardwareProfile | None) -> Sharing:
    """How the devices of `found` share the weights: as `policy` says, else in the faster way.

    profile: the machine's rates; None where they are unknown: then `found` decides.
    """
    sharing = found.sharing
    if policy.gather_weights is not None or not sharing.gather or profile is None:
        return sharing
    return replace(sharing, gather=chooses_gather(profile, shape, policy, found.memory, sharing.count))


def chooses_gather(
    profile: HardwareProfile | None, shape: ModelShape, policy: Policy, memory: Memory, count: int
) -> bool:
    """Whether a sweep's weights reach `count` like GPUs sooner if each transfers a part and they gather the rest.

    Transfers and gathering overlap. Where the GPUs were not measured together, they gather: a link between GPUs is at
    least as fast as one from the host, and more weights stay on the GPUs. Where the weights fit in one way only, that
    way is taken; where each GPU holds them all, nothing is gathered.
    """
    plans = {}
    for gather in (False, True):
        try:
            sharing = Sharing(count=count, gather=gather)
            plans[gather] = make_plan(shape, policy, memory, on_cpu=False, sharing=sharing)
        except CapacityError:
            continue
    if len(plans) < 2:
        return True in plans
    alone_bytes = shape.weight_bytes * (100 - plans[False].weights.gpu) / 100
    if alone_bytes == 0:
        return False
    if profile is None or profile.gather_bytes_s is None or profile.links_together_bytes_s is None:
        return True
    part_bytes = shape.weight_bytes / count * (100 - plans[True].weights.gpu) / 100
    others_bytes = shape.weight_bytes * (count - 1) / count
    link = profile.links_together_bytes_s
    return max(part_bytes / link, others_bytes / profile.gather_bytes_s) < alone_bytes / link
