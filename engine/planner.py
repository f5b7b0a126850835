"""Fits a policy to a model and the memory at hand: shares, budgets and sizes, or a one-line reason why not (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import CapacityError
from engine.hardware import Memory
from engine.placement import Tier
from engine.policy import Policy, Share
from engine.schedule import Limits

_ROWS = {"cpu": (1024, 512, 256, 128, 64), "other": (8192, 4096, 2048, 1024, 512, 256, 128, 64)}
_WORK_FRACTION = 0.3
"""Of the device memory that weights leave, how much a micro-batch's temporaries may take."""
_CACHE_RESERVE = 0.1
"""Of the device memory, how much a greedy plan leaves to the KV cache when weights would take everything."""
LOGITS_BYTES = 128 << 20
"""Size of one chunk of float32 logits; sampling holds a few such at once."""
_LOGITS_COPIES = 3
_SEQUENCES = 256
_BATCHES = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model, in bytes of the dtype it runs in."""

    unit_bytes: tuple[int, ...]
    """Of the decoder layers and of what streams behind them (the head)."""
    embedding_bytes: int
    """Of the token embedding, unless it is among `unit_bytes` (tied)."""
    outer_bytes: int
    """Of what is needed throughout: norms, position tables; it is copied to the device for good."""
    cache_row_bytes: int
    """Of a token's keys and values, all layers."""
    cache_layer_row_bytes: int
    """The same in the widest layer."""
    hidden_row_bytes: int
    work_row_bytes: int
    """Temporaries of one row inside a layer, about."""

    @property
    def weight_bytes(self) -> int:
        """All weights, once."""
        return sum(self.unit_bytes) + self.embedding_bytes + self.outer_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A policy made definite."""

    weights: Share
    kv_cache: Share | None
    """None: device first, then host, then disk."""
    activations: Share
    cache_budgets: dict[Tier, int]
    """Bytes of KV cache by tier, at most."""
    limits: Limits


def make_plan(shape: ModelShape, policy: Policy, memory: Memory, *, on_cpu: bool) -> Plan:
    """Make `policy` definite, filling what it leaves open greedily: device, then host, then disk if there is one.

    Raises `CapacityError`, with the numbers and the nearest policy that fits, when it does not fit.
    """
    return _Planner(shape, policy, memory, on_cpu).plan()


class _Planner:
    def __init__(self, shape: ModelShape, policy: Policy, memory: Memory, on_cpu: bool) -> None:
        self.shape, self.policy, self.memory, self.on_cpu = shape, policy, memory, on_cpu

    def plan(self) -> Plan:
        weights = self.policy.weights or self._greedy_weights()
        self._check_weights(weights)
        device = self.memory.device - self._device_weights(weights)
        rows = self._rows_per_batch(device)
        device -= self._work(rows)
        host = self.memory.host - self._part(weights.cpu)
        if self.memory.shared:  # device and host tier are one memory
            host = min(host, self.memory.host - (self.memory.device - device) - self._part(weights.cpu))
        disk = self.memory.disk - self._part(weights.disk)
        activations = self.policy.activations or Share(gpu=100, cpu=0)
        left = {"device": device, "host": host, "disk": disk}
        hidden_rows = self._hidden_rows(activations, left)
        hidden = hidden_rows * self.shape.hidden_row_bytes / 100
        budgets: dict[Tier, int] = {
            "device": int(device - hidden * activations.gpu),
            "host": int(host - hidden * activations.cpu),
            "disk": int(disk - hidden * activations.disk),
        }
        if self.memory.shared:
            budgets["host"] = min(budgets["host"], int(host - hidden * 100))
            if self.policy.kv_cache is not None and self.policy.kv_cache.gpu and self.policy.kv_cache.cpu:
                budgets["device"], budgets["host"] = budgets["device"] // 2, budgets["host"] // 2
            elif self.policy.kv_cache is None:
                budgets["host"] = 0
        if self.policy.kv_cache is None and self.policy.offload_dir is None:
            budgets["disk"] = 0
        staged = max(self._work(rows) // 2, 64 << 20)
        limits = Limits(
            sequences_per_batch=self.policy.gpu_batch_size or _SEQUENCES,
            batches=self.policy.num_gpu_batches or _BATCHES,
            rows_per_batch=rows,
            cached_rows_per_batch=max(1, staged // (3 * self.shape.cache_layer_row_bytes)),
            rows_per_sweep=hidden_rows,
            pad=self.policy.pad_to_seq_len,
        )
        return Plan(
            weights=weights,
            kv_cache=self.policy.kv_cache,
            activations=activations,
            cache_budgets={tier: max(0, budget) for tier, budget in budgets.items()},
            limits=limits,
        )

    def _part(self, percent: float) -> int:
        return round(self.shape.weight_bytes * percent / 100)

    def _slots(self, weights: Share) -> int:
        if weights.gpu >= 100:
            return 0
        # A parameter cut by the border passes through the slot whole: at most one per unit, so at most a unit.
        return 2 * max(self.shape.unit_bytes)

    def _device_weights(self, weights: Share) -> int:
        outer = self.shape.outer_bytes if weights.gpu < 100 else 0
        return self._part(weights.gpu) + self._slots(weights) + outer

    def _work(self, rows: int) -> int:
        return rows * self.shape.work_row_bytes + _LOGITS_COPIES * self._logits_bytes()

    def _logits_bytes(self) -> int:
        return min(LOGITS_BYTES, max(self.memory.device // 16, 1 << 20))

    def _rows_per_batch(self, left: int) -> int:
        choices = _ROWS["cpu" if self.on_cpu else "other"]
        fitting = [rows for rows in choices if rows * self.shape.work_row_bytes <= _WORK_FRACTION * max(0, left)]
        return fitting[0] if fitting else choices[-1]

    def _hidden_rows(self, activations: Share, left: dict[str, int]) -> int:
        percents = {"device": activations.gpu, "host": activations.cpu, "disk": activations.disk}
        fraction = {"device": 0.25, "host": 0.5, "disk": 0.5}
        rows = [
            max(0, left[tier]) * fraction[tier] / (self.shape.hidden_row_bytes * percent / 100)
            for tier, percent in percents.items()
            if percent > 0
        ]
        return max(1, int(min(rows)))

    def _greedy_weights(self) -> Share:
        shape, memory = self.shape, self.memory
        smallest = self._work(_ROWS["cpu"][-2])
        resident = shape.weight_bytes + smallest + _CACHE_RESERVE * memory.device
        if resident <= memory.device:
            return Share(gpu=100, cpu=0)
        slots = self._slots(Share(gpu=0, cpu=100)) + shape.outer_bytes
        rest = memory.device - slots
        room = rest - self._work(self._rows_per_batch(rest)) - _CACHE_RESERVE * memory.device
        gpu = int(max(0.0, min(99.0, 100 * room / shape.weight_bytes)))
        host = memory.host - (memory.device if memory.shared else 0)
        cpu = int(max(0.0, min(100.0 - gpu, 100 * 0.9 * host / shape.weight_bytes)))
        if gpu + cpu < 100 and self.policy.offload_dir is None:
            raise CapacityError(
                f"weights {_gb(shape.weight_bytes)} exceed what device ({_gb(memory.device)}) and host "
                f"({_gb(host)}) hold; set offload-dir to let {100 - gpu - cpu} % of them go to disk"
            )
        return Share(gpu=gpu, cpu=cpu, disk=100 - gpu - cpu)

    def _check_weights(self, weights: Share) -> None:
        shape, memory = self.shape, self.memory
        work = self._work(_ROWS["cpu"][-1])
        needed = self._device_weights(weights) + work
        if needed > memory.device:
            slots = self._slots(Share(gpu=0, cpu=100)) + shape.outer_bytes
            room = memory.device - slots - work
            if room < 0:
                raise CapacityError(
                    f"even with no weights on the device, two layers ({_gb(slots)}) and the work on them ({_gb(work)}) "
                    f"exceed the {_gb(memory.device)} of device memory; raise gpu-memory to {_gb(slots + work)}"
                )
            gpu = int(100 * room / shape.weight_bytes)
            cpu = int(weights.cpu + weights.gpu - gpu)
            raise CapacityError(
                f"weights {_gb(shape.weight_bytes)} x {weights.gpu:g} % + layers in transit "
                f"{_gb(needed - work - self._part(weights.gpu))} + work {_gb(work)} exceed the {_gb(memory.device)} of "
                f"device memory; the nearest that fits is weights: {{gpu: {gpu}, cpu: {cpu}, "
                f"disk: {100 - gpu - cpu}}}"
            )
        placed = self._part(weights.cpu)
        host = memory.host - (needed if memory.shared else 0)
        if placed > host:
            cpu = max(0, int(100 * host / shape.weight_bytes))
            raise CapacityError(
                f"weights {_gb(shape.weight_bytes)} x {weights.cpu:g} % = {_gb(placed)} exceed the {_gb(max(0, host))} "
                f"of host memory; the nearest that fits is weights: {{gpu: {weights.gpu:g}, cpu: {cpu}, "
                f"disk: {100 - weights.gpu - cpu:g}}} with an offload-dir"
            )
        if self._part(weights.disk) > memory.disk:
            raise CapacityError(
                f"weights {_gb(shape.weight_bytes)} x {weights.disk:g} % = {_gb(self._part(weights.disk))} exceed the "
                f"{_gb(memory.disk)} free in offload-dir {self.policy.offload_dir}; name another, or lower the disk share"
            )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
