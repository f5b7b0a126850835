"""The memory a model needs: on the smallest device that runs it, and on this machine, by the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import CapacityError
from engine.planning.fit import gb
from engine.planning.hardware import Memory
from engine.planning.planner import Plan, make_plan
from engine.policy import Policy

if TYPE_CHECKING:
    from engine.planning.model_shape import ModelShape

_PLENTY = 1 << 50
_STREAMED = {"percent": [0, 100, 0, 100, 0, 100]}
"""Weights, keys and values and hidden states in host memory; layers pass through the device."""
_STEP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryNeeds:
    """Bytes, in the dtype that the model runs in."""

    dtype: str
    weight_bytes: int
    """The bytes of all stored weights."""
    token_bytes: int
    """Keys and values of a token in all layers."""
    state_bytes: int
    """States of a sequence in all layers."""
    least_device_bytes: int
    """Memory of an accelerator with which the weights can pass through it from host memory."""

    def lines(self) -> list[str]:
        """The needs in words."""
        states = f" and {self.state_bytes / 1e6:,.1f} MB of states for each sequence" if self.state_bytes else ""
        return [
            f"{gb(self.weight_bytes)} of weights, {self.token_bytes / 1e3:,.1f} kB of keys and values for each token"
            f"{states} ({self.dtype})",
            f"at least {gb(self.least_device_bytes)} of device memory, with weights, keys and values in host memory",
        ]


def memory_needs(shape: ModelShape, dtype: str) -> MemoryNeeds:
    """What a model of these sizes needs on an accelerator."""
    return MemoryNeeds(
        dtype=dtype,
        weight_bytes=shape.weight_bytes,
        token_bytes=shape.cache_row_bytes,
        state_bytes=shape.state_bytes,
        least_device_bytes=_least_device_bytes(shape),
    )


def _least_device_bytes(shape: ModelShape) -> int:
    """The smallest device memory, rounded to a megabyte."""
    policy = Policy.from_mapping(_STREAMED, where="check")

    def fits(device_bytes: int) -> bool:
        try:
            plan = make_plan(shape, policy, Memory(device=device_bytes, host=_PLENTY, disk=0), on_cpu=False)
        except CapacityError:
            return False
        return not plan.is_tight

    low, high = 0, _STEP
    while not fits(high):
        low, high = high, 2 * high
    while high - low > _STEP:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def plan_here(shape: ModelShape, memory: Memory, *, on_cpu: bool) -> str:
    """Where this machine would hold the weights under the policy `auto`, or why it could not, in one line."""
    try:
        plan: Plan = make_plan(shape, Policy(), memory, on_cpu=on_cpu)
    except CapacityError as error:
        return f"does not fit on this machine{', on the CPU' if on_cpu else ''}: {error}"
    weights = plan.weights
    if on_cpu:
        return f"fits this machine's memory ({gb(memory.host)} may be used), on the CPU"
    return (
        f"fits this machine ({gb(memory.device)} of device and {gb(memory.host)} of host memory may be used): "
        f"{weights.gpu:g} % of the weights on the device, {weights.cpu:g} % in host memory"
    )
