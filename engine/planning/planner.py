"""Fits a policy to a model and the memory at hand: shares, budgets and sizes, or a one-line reason why not (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import CapacityError
from engine.memory.disk.file import BLOCK, align_up
from engine.memory.layout import TIERS, Tier, percents
from engine.planning.admission import Admission
from engine.planning.hardware import Memory
from engine.policy import Policy, Share
from engine.schedule.scheduler import Limits

_ROWS = {"cpu": (1024, 512, 256, 128, 64), "other": (8192, 4096, 2048, 1024, 512, 256, 128, 64)}
_WORK_FRACTION = 0.3
"""Of the device memory that weights leave, how much a micro-batch's temporaries may take."""
_CACHE_RESERVE = 0.06
"""Of the device memory, how much a greedy plan leaves to the KV cache when weights would take everything."""
LOGITS_BYTES = 128 << 20
"""Size of one chunk of float32 logits; sampling holds a few such at once."""
_LOGITS_COPIES = 3
_FRAGMENTATION = 0.04
"""Of the device memory, what the allocator may hold without being able to use it."""
_FREE_ROWS = 4096
"""Rows whose arithmetic takes less time than the transfer of all weights: accelerators on PCIe multiply 5,000 (T4: 65
TFLOP/s, 12 GB/s) to 13,000 (H100: 700, 55) times as many 16-bit weights as they are sent."""
_MOST_HIDDEN_ROWS = 1 << 17
"""Of a sweep: ten times as many as are computed while all weights come. More would save next to nothing of them."""
_ADMITTED_ROWS = 8000
"""Rows of prompts that a sweep lets in for as many bytes across the link as all 16-bit weights have: on a card that
computes 13,000 meanwhile, 0.6 of them. Too few make the start long, too many leave the link idle (docs/adr/0009)."""
_OPERATIONS_BETWEEN_FETCHES = 2.5e12
"""Of a layer on prompts, while keys and values of decode steps come: 4 ms of a fast card (650 TFLOP/s), in which a link
carries about what the staging buffers hold. Less at a time would be more calls than the host can make meanwhile."""
_LEAST_BETWEEN_FETCHES = 1024
"""Rows of prompts that still multiply at nearly a card's full rate."""
_FREE_RESIDENT_ROWS = 128
"""The same where weights lie in the device's own memory (T4: 200, H100: 210)."""
STAGING_BUFFERS = 4
"""For offloaded keys and values: one is computed with, two are full, and one is filled. The link is not idle while
other work is computed."""
_GAP_BYTES = 512 << 10
"""What a link carries (55 GB/s) in the 10 us that each further copy costs it: an H100 got copies of 5 MB at 50 GB/s."""
READ_AHEAD_BYTES = 256 << 20
"""Staging memory for what the sweep reads of weights on disk: an eighth of a second of a fast disk."""
_BEHIND_DISK = 4
"""Micro-batches on their way to the disk or from it."""
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
    coded_layer_row_bytes: int = 0
    """The same off the device, encoded; 0 without a codec."""
    hidden_row_bytes: int
    work_row_bytes: int
    """Temporaries of one row inside a layer, about."""

    is_padded: bool = False
    """The family carries its own attention and runs in padded micro-batches."""
    is_plain: bool = False
    """Attention is a softmax over all tokens before: no caps, sinks, windows, nor code of the family's own."""
    reads_in_place: bool = False
    """Attention reads keys and values on the device where they lie."""
    stored_part: float = 1.0
    """Of the bytes that layers have as numbers, what they have as they are stored and moved."""
    expanded_bytes: int = 0
    """Device memory that encoded layers are expanded into, in turn, and what that takes besides; 0 without a codec."""
    score_bytes: int = 0
    """Of one row's attention to one key, all heads and their copies, where a family keeps them; else 0."""

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
    read_ahead_bytes: int = 0
    """Host memory that weights on disk are read into, ahead of the sweep."""

    is_tight: bool = False
    """Weights leave less of the device than work takes at most: it runs, with luck."""

    @property
    def uses_disk(self) -> bool:
        """Whether anything is, or may come to be, on disk."""
        return self.weights.disk > 0 or self.activations.disk > 0 or self.cache_budgets["disk"] > 0


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
        host = self.memory.host - self._part(weights.cpu) - self._read_ahead(weights)
        if self.memory.shared:  # device and host tier are one memory
            host -= self._device_weights(weights)
            device = min(device, host)
        rows = self._rows_per_batch(device)
        device -= self._needed(rows)
        if self.memory.shared:
            host -= self._work(rows)
        if not self.on_cpu:
            host -= min(self._behind_disk(rows), max(0, host) // 4)
        disk = self.memory.disk - self._part(weights.disk)
        left: dict[Tier, int] = {"device": device, "host": host, "disk": disk}
        activations = self.policy.activations or self._activations(left, rows)
        hidden_rows = self._hidden_rows(activations, left)
        limits = Limits(
            sequences_per_batch=self.policy.gpu_batch_size or _SEQUENCES,
            batches=self.policy.num_gpu_batches or _BATCHES,
            rows_per_batch=rows,
            cached_rows_per_batch=max(1, self._staged(rows) // self._gathered_row_bytes()),
            reads_on_host=self.policy.cpu_cache_compute and self.shape.is_plain,
            gap_rows=_GAP_BYTES // self._stored_row_bytes(),
            reads_in_place=self.shape.reads_in_place,
            rows_per_sweep=hidden_rows,
            free_rows=0 if self.on_cpu else max(_FREE_RESIDENT_ROWS, self._rows_behind_transfer(weights)),
            admission=self._admission(weights),
            rows_between_fetches=self._rows_between_fetches(),
            pad=self.policy.pad_to_seq_len,
            rectangular=self.shape.is_padded,
            scores_per_batch=self._scores_per_batch(rows, device),
        )
        return Plan(
            weights=weights,
            kv_cache=self.policy.kv_cache,
            activations=activations,
            cache_budgets=self._cache_budgets(left, activations, hidden_rows * self.shape.hidden_row_bytes),
            limits=limits,
            read_ahead_bytes=self._read_ahead(weights),
            is_tight=device < 0,
        )

    def _read_ahead(self, weights: Share) -> int:
        """Staging memory for weights on disk; no more than they are, nor than half of what others leave."""
        left = max(0, self._rooms(weights.gpu)["host"] - self._part(weights.cpu))
        return min(READ_AHEAD_BYTES, left // 2 // BLOCK * BLOCK, align_up(self._part(weights.disk)))

    def _rows_behind_transfer(self, weights: Share) -> int:
        return int(_FREE_ROWS * self._streamed_part(weights))

    def _streamed_part(self, weights: Share) -> float:
        """What a sweep brings of weights, in parts of the bytes that all have as numbers."""
        return self.shape.stored_part * (100 - weights.gpu) / 100

    def _brings_cache(self) -> bool:
        """Whether keys and values off the device are brought there beside the computation."""
        return not self.on_cpu and not self.policy.cpu_cache_compute

    def _rows_between_fetches(self) -> int | None:
        if not self._brings_cache():
            return None
        shape = self.shape
        per_row = shape.weight_bytes / shape.stored_part / len(shape.unit_bytes)  # 2 a weight, which is of 2 bytes
        return max(_LEAST_BETWEEN_FETCHES, int(_OPERATIONS_BETWEEN_FETCHES / per_row))

    def _admission(self, weights: Share) -> Admission | None:
        """How many prompts are let in at once; None where the weights come from a disk, which is slower than the link.

        A further sweep would cost more than it hides there.
        """
        if not self._brings_cache() or weights.disk > 0:
            return None
        shape = self.shape
        row_bytes = shape.cache_row_bytes * self._stored_row_bytes() / shape.cache_layer_row_bytes
        return Admission(
            rows_beside_weights=_ADMITTED_ROWS * self._streamed_part(weights),
            rows_beside_cached_row=_ADMITTED_ROWS * shape.stored_part * row_bytes / shape.weight_bytes,
        )

    def _scores_per_batch(self, rows: int, left: int) -> int | None:
        """What a micro-batch's attention scores may be: beyond that they would not fit in any case.

        Never less than a micro-batch of one sequence of `rows` rows has.
        """
        if not self.shape.score_bytes:
            return None
        return max(rows * rows, max(0, left) // self.shape.score_bytes)

    def _cache_budgets(self, left: dict[Tier, int], activations: Share, hidden_bytes: int) -> dict[Tier, int]:
        """What hidden states leave of the tiers that the cache may use."""
        cache, shared = self.policy.kv_cache, self.memory.shared
        hidden = {tier: hidden_bytes * percent / 100 for tier, percent in percents(activations).items()}
        budgets = {tier: int(left[tier] - hidden[tier]) for tier in TIERS}
        if cache is not None:
            is_used = {tier: percent > 0 for tier, percent in percents(cache).items()}
        else:
            is_used = {"device": True, "host": not shared, "disk": self.policy.offload_dir is not None}
        if shared:  # what both have left is the same memory
            rest = int(left["host"] - hidden["device"] - hidden["host"])
            for tier in ("device", "host"):
                budgets[tier] = min(budgets[tier], rest // max(1, is_used["device"] + is_used["host"]))
        return {tier: max(0, budgets[tier]) if is_used[tier] else 0 for tier in TIERS}

    def _part(self, percent: float) -> int:
        return round(self.shape.weight_bytes * percent / 100)

    def _slots(self, weights: Share) -> int:
        if weights.gpu >= 100:
            return 0
        # A parameter cut by the border passes through the slot whole: at most one per unit, so at most a unit.
        return 2 * max(self.shape.unit_bytes)

    def _device_weights(self, weights: Share) -> int:
        outer = self.shape.outer_bytes if weights.gpu < 100 else 0
        return self._part(weights.gpu) + self._slots(weights) + outer + self.shape.expanded_bytes

    def _work(self, rows: int) -> int:
        return rows * self.shape.work_row_bytes + _LOGITS_COPIES * self._logits_bytes()

    def _needed(self, rows: int) -> int:
        """What micro-batches of so many rows take of the device besides weights."""
        return self._work(rows) + self._overhead(rows)

    def _staged(self, rows: int) -> int:
        """What the keys and values of a micro-batch's decode steps may take on the device."""
        return max(self._work(rows) // 2, min(64 << 20, self.memory.device // 16))

    def _stored_row_bytes(self) -> int:
        """Of a layer's row of the KV cache off the device."""
        return self.shape.coded_layer_row_bytes or self.shape.cache_layer_row_bytes

    def _gathered_row_bytes(self) -> int:
        """What a row that attention gathers takes: in staging buffers, decoded, and collected."""
        shape = self.shape
        num_copies = (shape.coded_layer_row_bytes > 0) + (not shape.reads_in_place)
        return max(1, STAGING_BUFFERS * self._stored_row_bytes() + num_copies * shape.cache_layer_row_bytes)

    def _overhead(self, rows: int) -> int:
        """Staging buffers, which stay, and the gaps that an accelerator's allocator leaves."""
        return 0 if self.on_cpu else self._staged(rows) + int(_FRAGMENTATION * self.memory.device)

    def _behind_disk(self, rows: int) -> int:
        """Host memory for what goes to and comes from the disk of the cache and of hidden states.

        Micro-batches each way, in blocks that an allocator rounds up to powers of two.
        """
        cache, hidden = self.policy.kv_cache, self.policy.activations
        may_be_there = self.policy.offload_dir is not None and (cache is None or cache.disk > 0)
        kept = self._staged(rows) if may_be_there else 0
        if hidden is not None and hidden.disk > 0:
            kept += rows * self.shape.hidden_row_bytes
        return _BEHIND_DISK * kept

    def _logits_bytes(self) -> int:
        return min(LOGITS_BYTES, max(self.memory.device // 16, 1 << 20))

    @staticmethod
    def _with_logits(num_bytes: int) -> int:
        """The least device memory that holds `num_bytes` besides the logits, which grow with it up to a limit."""
        growing = max(num_bytes * 16 // (16 - _LOGITS_COPIES) + 1, num_bytes + (_LOGITS_COPIES << 20))
        return min(growing, num_bytes + _LOGITS_COPIES * LOGITS_BYTES)

    def _rows_per_batch(self, left: int) -> int:
        choices = _ROWS["cpu" if self.on_cpu else "other"]
        fitting = [rows for rows in choices if rows * self.shape.work_row_bytes <= _WORK_FRACTION * max(0, left)]
        return fitting[0] if fitting else choices[-1]

    def _activations(self, left: dict[Tier, int], rows: int) -> Share:
        """On the device, if it has room for the hidden states of a micro-batch at least; else where there is more."""
        on_device, on_host = Share(gpu=100, cpu=0), Share(gpu=0, cpu=100)
        room = self._hidden_rows(on_device, left)
        if self.memory.shared or room >= min(rows, self._hidden_rows(on_host, left)):
            return on_device
        return on_host

    def _hidden_rows(self, activations: Share, left: dict[Tier, int]) -> int:
        fraction = {"device": 0.25, "host": 0.5, "disk": 0.5}
        rows = [
            max(0, left[tier]) * fraction[tier] / (self.shape.hidden_row_bytes * percent / 100)
            for tier, percent in percents(activations).items()
            if percent > 0
        ]
        return max(1, int(min([*rows, _MOST_HIDDEN_ROWS])))

    def _greedy_weights(self) -> Share:
        shape, memory = self.shape, self.memory
        kept = self._needed(_ROWS["cpu"][-2]) + _CACHE_RESERVE * memory.device
        resident = shape.weight_bytes + shape.expanded_bytes + kept
        if resident <= memory.device:
            return Share(gpu=100, cpu=0)
        slots = self._slots(Share(gpu=0, cpu=100)) + shape.outer_bytes + shape.expanded_bytes
        rest = memory.device - slots
        rows = self._rows_per_batch(rest)
        room = rest - self._needed(rows) - _CACHE_RESERVE * memory.device
        gpu = int(max(0.0, min(99.0, 100 * room / shape.weight_bytes)))
        host = memory.host - (memory.device if memory.shared else 0)
        cpu = int(max(0.0, min(100.0 - gpu, 100 * 0.9 * host / shape.weight_bytes)))
        if gpu + cpu < 100 and self.policy.offload_dir is None:
            self._check_transit(Share(gpu=0, cpu=100))
            raise CapacityError(
                f"weights {_gb(shape.weight_bytes)} exceed what device ({_gb(memory.device)}) and host "
                f"({_gb(host)}) hold; set offload-dir to let {100 - gpu - cpu} % of them go to disk"
            )
        return Share(gpu=gpu, cpu=cpu, disk=100 - gpu - cpu)

    def _rooms(self, gpu: float) -> dict[Tier, int]:
        """Bytes of weights that each tier can take when `gpu` percent of them are on the device."""
        memory, transit = self.memory, self._device_weights(Share(gpu=gpu, cpu=100 - gpu)) - self._part(gpu)
        work = self._work(_ROWS["cpu"][-1])
        host = memory.host - (self._part(gpu) + transit + work if memory.shared else 0)
        return {"device": memory.device - transit - work, "host": host, "disk": memory.disk}

    def _check_weights(self, weights: Share) -> None:
        """Raise `CapacityError` for weights that do not fit, with the nearest shares that do."""
        total, memory, rooms = self.shape.weight_bytes, self.memory, self._rooms(weights.gpu)
        work = self._work(_ROWS["cpu"][-1])
        parts = {"device": self._part(weights.gpu), "host": self._part(weights.cpu), "disk": self._part(weights.disk)}
        transit = memory.device - rooms["device"] - work
        self._check_transit(weights)
        if parts["device"] > rooms["device"]:
            raise CapacityError(
                f"weights {_gb(total)} x {weights.gpu:g} % + layers in transit {_gb(transit)} + work {_gb(work)} "
                f"exceed the {_gb(memory.device)} of device memory; {self._advice(weights)}"
            )
        if parts["host"] > rooms["host"]:
            raise CapacityError(
                f"weights {_gb(total)} x {weights.cpu:g} % = {_gb(parts['host'])} exceed the {_gb(rooms['host'])} "
                f"of host memory; {self._advice(weights)}"
            )
        if parts["disk"] > rooms["disk"]:
            raise CapacityError(
                f"weights {_gb(total)} x {weights.disk:g} % = {_gb(parts['disk'])} exceed the {_gb(memory.disk)} "
                f"free in offload-dir {self.policy.offload_dir}; {self._advice(weights)}"
            )

    def _check_transit(self, weights: Share) -> None:
        """Raise `CapacityError` when the device cannot even hold layers in transit and the work on them."""
        if self._rooms(0)["device"] >= 0 or self._part(weights.gpu) <= self._rooms(weights.gpu)["device"]:
            return
        layers = "two layers" + (" and one expanded" if self.shape.expanded_bytes else "")
        slots, work = self._device_weights(Share(gpu=0, cpu=100)), self._work(_ROWS["cpu"][-1])
        enough = self._with_logits(self._device_weights(weights) + _ROWS["cpu"][-1] * self.shape.work_row_bytes)
        raise CapacityError(
            f"even with no weights on the device, {layers} ({_gb(slots)}) and the work on them ({_gb(work)}) "
            f"exceed the {_gb(self.memory.device)} of device memory; raise gpu-memory to {_gb_up(enough)}"
        )

    def _advice(self, weights: Share) -> str:
        """Name the nearest shares that fit, in whole percents; what a tier cannot take goes to memory before disk."""
        percent = {tier: self._percent(room) for tier, room in self._rooms(0).items()}
        gpu = min(int(weights.gpu), percent["device"])
        host = self._percent(self._rooms(gpu)["host"])
        disk = int(weights.disk) if self.policy.offload_dir is None else min(int(weights.disk), percent["disk"])
        cpu = min(100 - gpu - disk, host)
        gpu = min(100 - cpu - disk, percent["device"]) if not self.memory.shared else gpu
        disk = 100 - gpu - cpu
        if self.policy.offload_dir is not None and disk > percent["disk"]:
            return (
                f"all tiers together hold {gpu + cpu + percent['disk']} % of them; name an offload-dir with more room"
            )
        advice = f"the nearest that fits is weights: {{gpu: {gpu}, cpu: {cpu}, disk: {disk}}}"
        return advice + (" with an offload-dir" if disk and self.policy.offload_dir is None else "")

    def _percent(self, num_bytes: int) -> int:
        """Whole percents of the weights that fit into this many bytes."""
        return max(0, min(100, int(100 * num_bytes / self.shape.weight_bytes)))


def _gb_up(num_bytes: float) -> str:
    unit = 1e8 if num_bytes >= 1e8 else 1e5
    return _gb(math.ceil(num_bytes / unit) * unit)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
