"""Whether weights fit the tiers; if not, a one-line reason that names the nearest shares that do (pure)."""

from __future__ import annotations

import math

from engine.errors import CapacityError
from engine.memory.tiers import Tier
from engine.planning.demand import LEAST_BATCH_ROWS, Demand
from engine.policy import Share


class Fit:
    """Checks shares of weights against the memory of the tiers."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand

    def check_weights(self, weights: Share) -> None:
        """Raise `CapacityError` for weights that do not fit, with the nearest shares that do."""
        need = self._demand
        total, memory, rooms = need.shape.weight_bytes, need.memory, need.rooms(weights.gpu)
        work = need.work(LEAST_BATCH_ROWS)
        parts = {
            "device": need.weights.of_one(weights.gpu),
            "host": need.weights.on_host(weights.cpu),
            "disk": need.weights.on_disk(weights.disk),
        }
        device = need.device_room(weights.gpu)
        transit = device - rooms["device"] - work
        self.check_transit(weights)
        if parts["device"] > rooms["device"]:
            raise CapacityError(
                f"weights {gb(need.weights.of_one(100))} x {weights.gpu:g} % + layers in transit {gb(transit)} + work "
                f"{gb(work)} exceed the {gb(device)} of device memory; {self._advice(weights)}"
            )
        if parts["host"] > rooms["host"]:
            raise CapacityError(
                f"weights {gb(total)} x {weights.cpu:g} % = {gb(parts['host'])} exceed the {gb(rooms['host'])} "
                f"of host memory; {self._advice(weights)}"
            )
        if parts["disk"] > rooms["disk"]:
            raise CapacityError(
                f"weights {gb(total)} x {weights.disk:g} % = {gb(parts['disk'])} exceed the {gb(memory.disk)} "
                f"free in offload-dir {need.policy.offload_dir}; {self._advice(weights)}"
            )

    def check_states(self, budgets: dict[Tier, int]) -> None:
        """Raise `CapacityError` where no tier that the KV cache may use can hold the states of a sequence."""
        shape = self._demand.shape
        one = shape.state_bytes + shape.cache_row_bytes
        if not shape.state_bytes or max(budgets.values()) >= one:
            return
        told = ", ".join(f"{tier} {gb(room)}" for tier, room in budgets.items())
        raise CapacityError(
            f"the states of one sequence and a token's keys and values take {gb(one)}, and what is left for the KV "
            f"cache is {told}; give kv-cache a tier with more room, or raise gpu-memory or cpu-memory"
        )

    def check_transit(self, weights: Share) -> None:
        """Raise `CapacityError` when the device cannot even hold layers in transit and their workspace."""
        need = self._demand
        if need.rooms(0)["device"] >= 0 or need.weights.of_one(weights.gpu) <= need.rooms(weights.gpu)["device"]:
            return
        layers = "three layers" if need.sharing.gather else "two layers"
        layers = "two groups of experts, or two layers without," if need.experts_apart else layers
        if need.expanded:
            layers += " and one expanded" if need.expands_whole else " and some experts of one expanded"
        slots, work = need.device_weights(Share(gpu=0, cpu=100)), need.work(LEAST_BATCH_ROWS)
        enough = need.with_logits(need.device_weights(weights) + LEAST_BATCH_ROWS * need.row_bytes)
        raise CapacityError(
            f"even with no weights on the device, {layers} ({gb(slots)}) and the work on them ({gb(work)}) "
            f"exceed the {gb(need.device_room(0))} {self._larger_device(enough)}"
        )

    def _larger_device(self, enough: int) -> str:
        """The name of the device's memory, and how to raise it to `enough` bytes: on a CPU it is the host's."""
        memory, policy = self._demand.memory, self._demand.policy
        if not memory.shared or policy.gpu_memory is not None:
            return f"of device memory; raise gpu-memory to {_rounded_up(enough)}"
        more = _rounded_up(max(1, enough - memory.device))
        if policy.cpu_memory is not None:
            return f"that cpu-memory {gb(policy.cpu_memory)} leaves after what the process holds; add {more} to it"
        return f"of host memory that this process may still take; free {more}, or raise the limit that it runs under"

    def _advice(self, weights: Share) -> str:
        """Name the nearest shares that fit, in whole percents."""
        nearest, asked = self._nearest(weights), weights
        while isinstance(nearest, Share) and nearest != asked:  # what else a plan holds follows from the shares
            asked, nearest = nearest, Fit(self._demand.with_weights(nearest))._nearest(nearest)
        if isinstance(nearest, str):
            return nearest
        advice = (
            f"the nearest that fits is weights: {{gpu: {nearest.gpu:g}, cpu: {nearest.cpu:g}, disk: {nearest.disk:g}}}"
        )
        return advice + (" with an offload-dir" if nearest.disk and self._demand.policy.offload_dir is None else "")

    def _nearest(self, weights: Share) -> Share | str:
        """The nearest shares, with everything else in the plan unchanged, or why there are none.

        Weights that do not fit a tier go to memory before disk.
        """
        need = self._demand
        whole: dict[Tier, int] = {
            "device": need.weights.of_one(100),
            "host": need.weights.on_host(100),
            "disk": need.weights.on_disk(100),
        }
        percent = {tier: _percent(room, whole[tier]) for tier, room in need.rooms(0).items()}
        gpu = min(int(weights.gpu), percent["device"])
        host = _percent(need.rooms(gpu)["host"], whole["host"])
        disk = int(weights.disk) if need.policy.offload_dir is None else min(int(weights.disk), percent["disk"])
        cpu = min(100 - gpu - disk, host)
        gpu = min(100 - cpu - disk, percent["device"]) if not need.memory.shared else gpu
        disk = 100 - gpu - cpu
        if need.policy.offload_dir is not None and disk > percent["disk"]:
            return (
                f"all tiers together hold {gpu + cpu + percent['disk']} % of them; name an offload-dir with more room"
            )
        return Share(gpu=gpu, cpu=cpu, disk=disk)


def _percent(num_bytes: int, whole: int) -> int:
    """The whole percents of weights of `whole` bytes that fit into so many bytes."""
    return max(0, min(100, int(100 * num_bytes / whole)))


def _rounded_up(num_bytes: float) -> str:
    unit = 1e8 if num_bytes >= 1e8 else 1e5
    return gb(math.ceil(num_bytes / unit) * unit)


def gb(num_bytes: float) -> str:
    """`num_bytes` in GB, or in MB below a tenth of one."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
