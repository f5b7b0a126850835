"""Fits a policy to a model and the available memory: shares, budgets and sizes, or a one-line reason why not (pure)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from engine.errors import CapacityError
from engine.memory.tiers import TIERS, Tier, percents
from engine.planning.admission import Admission
from engine.planning.demand import SMALL_BATCH_ROWS, Demand
from engine.planning.draft.room import DRAFT_POLICY, DraftRoom
from engine.planning.fit import Fit, gb
from engine.planning.hardware import Memory
from engine.planning.limits import RECORDED_BYTES, RECORDED_ROWS, Limits
from engine.planning.model_shape import ModelShape
from engine.planning.sharing import ALONE, Sharing
from engine.policy import Policy, Share

_FREE_ROWS = 4096
"""The number of rows whose arithmetic takes less time than the transfer of all weights: accelerators on PCIe
multiply 5,000 (T4: 65 TFLOP/s, 12 GB/s) to 13,000 (H100: 700, 55) times as many 16-bit weights as they receive."""
_ADMITTED_ROWS = 8000
"""Prompt tokens admitted per sweep, per full model's worth of 16-bit weights transferred. An H100 computes about
13,000 tokens in that time; 60 % of that is admitted. Fewer make the start long, more leave the link idle
(docs/adr/0009)."""
_OPERATIONS_BETWEEN_FETCHES = 2.5e12
"""The operations on prompt rows in a layer between two fetches of keys and values: 4 ms of a fast GPU (650 TFLOP/s),
in which a link fills about the staging buffers. Fewer would mean more launches than the host can make in that time."""
_LEAST_BETWEEN_FETCHES = 1024
"""The least number of prompt rows that still multiply at nearly a GPU's full rate."""
_FREE_RESIDENT_ROWS = 128
"""The number of such rows where weights are in the device's own memory (T4: 200, H100: 210)."""
_GAP_BYTES = 512 << 10
"""The bytes that a link carries (at 55 GB/s) in the 10 us that each further copy costs: an H100 got copies of 5 MB
at 50 GB/s."""
_SEQUENCES = 256
_BATCHES = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A policy with every open choice made."""

    weights: Share
    kv_cache: Share | None
    """The shares of the KV cache; None: device first, then host, then disk."""
    activations: Share
    cache_budgets: dict[Tier, int]
    """The most bytes of KV cache by tier."""
    limits: Limits
    read_ahead_bytes: int = 0
    """The host memory into which weights on disk are read, ahead of the sweep."""

    expands_whole: bool = True
    """Whether encoded experts are decoded with their layer, once a sweep; otherwise some at a time, for each
    micro-batch."""
    experts_apart: bool = False
    """Whether those are also transferred to the device some at a time, separately from the rest of their layer."""
    draft: Plan | None = None
    """The plan of the draft model, which is on the device, if there is one."""
    is_tight: bool = False
    """The weights leave less device memory than the worst-case workspace; the plan may run out of memory."""

    @property
    def uses_disk(self) -> bool:
        """Whether anything is, or may come to be, on disk."""
        return self.weights.disk > 0 or self.activations.disk > 0 or self.cache_budgets["disk"] > 0


def make_plan(
    shape: ModelShape,
    policy: Policy,
    memory: Memory,
    *,
    on_cpu: bool,
    sharing: Sharing = ALONE,
    draft: ModelShape | None = None,
) -> Plan:
    """Complete `policy`, filling what it leaves open greedily: device, then host, then disk if there is one.

    With several engines that share the weights, `memory` has the device of each, and host and disk of all together; the
    plan is that of each. A `draft` model is on the device with its KV cache. Raises `CapacityError`, with the numbers
    and the nearest policy that fits, when it does not fit.
    """

    def made(policy: Policy, memory: Memory) -> Plan:
        return _Planner(shape, policy, memory, on_cpu, sharing).plan()

    return (
        made(policy, memory)
        if draft is None
        else _with_draft(DraftRoom(shape, draft, policy, memory, on_cpu, sharing), made)
    )


def _with_draft(room: DraftRoom, made: Callable[[Policy, Memory], Plan]) -> Plan:
    """The plan, as `made` in the memory that a draft leaves, with the draft's own plan."""
    policy, num_bytes = room.policy, room.least
    try:
        plan = made(policy, room.without(num_bytes))
    except CapacityError:
        made(policy, room.memory)  # what does not fit even alone says so
        raise room.refusal() from None
    with suppress(CapacityError):
        on_device = made(replace(policy, kv_cache=None), room.without(num_bytes)).cache_budgets["device"]
        larger = room.with_cache(on_device, plan.cache_budgets)
        plan, num_bytes = made(policy, room.without(larger)), larger
    draft = _Planner(room.draft, DRAFT_POLICY, room.alone(2 * num_bytes), room.on_cpu, ALONE).plan()
    draft = replace(
        draft,
        limits=room.limits(draft.limits, num_bytes),
        cache_budgets={"device": room.cache_bytes(num_bytes), "host": 0, "disk": 0},
    )
    return replace(plan, draft=draft)


class _Planner:
    def __init__(self, shape: ModelShape, policy: Policy, memory: Memory, on_cpu: bool, sharing: Sharing) -> None:
        self.shape, self.policy, self.memory, self.on_cpu = shape, policy, memory, on_cpu
        self.demand = Demand(shape, policy, memory, on_cpu=on_cpu, sharing=sharing)
        self.fit = Fit(self.demand)

    def plan(self) -> Plan:
        weights = self.policy.weights or self._greedy_weights()
        self.fit.check_weights(weights)
        device = self.demand.device_room(weights.gpu) - self.demand.device_weights(weights)
        host = self.demand.host_left(weights)
        if self.memory.shared:  # device and host tier are one memory
            device = min(device, host)
        rows = self.demand.rows_per_batch(device, is_resident=weights.gpu >= 100)
        own_rows = self.demand.own_rows(rows, device)
        beside_weights = device
        device -= self.demand.needed(own_rows, beside_weights)
        waiting_rows = self.demand.waiting_rows(device, rows)
        device -= self.demand.waiting(waiting_rows)
        if self.memory.shared:
            host -= self.demand.work(own_rows, beside_weights)
        if not self.on_cpu:
            host -= min(self.demand.behind_disk(rows), max(0, host) // 4)
        disk = self.demand.disk_left(weights)
        left: dict[Tier, int] = {"device": device, "host": host, "disk": disk}
        activations = self.policy.activations or self._activations(left, rows)
        hidden_rows = self.demand.hidden_rows(activations, left)
        left["device"] -= self.demand.beside_rows(hidden_rows)
        if self.memory.shared:
            left["host"] -= self.demand.beside_rows(hidden_rows)
        replays = self._replays(weights, activations)
        left["device"] -= RECORDED_ROWS * self.demand.row_bytes + RECORDED_BYTES if replays else 0
        limits = Limits(
            sequences_per_batch=self.policy.gpu_batch_size or _SEQUENCES,
            batches=self.policy.num_gpu_batches or _BATCHES,
            rows_per_batch=rows,
            rows_per_piece=own_rows,
            cached_rows_per_batch=max(1, self.demand.staged(rows) // self.demand.gathered_row_bytes()),
            reads_on_host=self.policy.cpu_cache_compute and self.shape.is_plain and not self.policy.batch_invariant,
            gap_rows=_GAP_BYTES // self.demand.stored_row_bytes(),
            reads_in_place=self.shape.reads_in_place,
            # Experts that are brought apart come once for all that wait for each other.
            rows_per_sweep=min(hidden_rows, waiting_rows)
            if self.demand.experts_apart and waiting_rows
            else hidden_rows,
            free_rows=self._free_rows(weights),
            replays=replays,
            admission=self._admission(weights),
            rows_between_fetches=self._rows_between_fetches(rows),
            waiting_rows=waiting_rows,
            most_states=self.demand.states_at_once(rows),
            # Where a state is continued, rounding depends on what a prefix ends with, and that on who shares it.
            continues=self.shape.continues and not (self.policy.batch_invariant and self.shape.state_bytes),
            pad=self.policy.pad_to_seq_len,
            rectangular=self.shape.is_padded,
            scores_per_batch=self._scores_per_batch(rows, device),
            logits_bytes=self.demand.logits_bytes(beside_weights),
        )
        budgets = self._cache_budgets(left, activations, hidden_rows * self.shape.hidden_row_bytes)
        self.fit.check_states(budgets)
        return Plan(
            weights=weights,
            kv_cache=self.policy.kv_cache,
            activations=activations,
            cache_budgets=budgets,
            limits=limits,
            read_ahead_bytes=self.demand.read_ahead(weights),
            expands_whole=self.demand.expands_whole,
            experts_apart=self.demand.experts_apart,
            is_tight=device < 0,
        )

    def _free_rows(self, weights: Share) -> int:
        if self.on_cpu or self.shape.state_bytes:  # a state cannot go back to before a draft
            return 0
        return max(_FREE_RESIDENT_ROWS, self._rows_behind_transfer(weights))

    def _replays(self, weights: Share, activations: Share) -> bool:
        """Whether decode steps always queue the same work on the device, so that it can be recorded."""
        shape, policy = self.shape, self.policy
        is_here = weights.gpu >= 100 and activations.gpu >= 100 and not self.demand.sharing.has_own
        is_plain = shape.is_plain and shape.reads_in_place and not shape.state_bytes and not shape.expanded_bytes
        is_plain &= not shape.handed_row_bytes
        return not self.on_cpu and is_here and is_plain and not policy.batch_invariant and policy.pad_to_seq_len is None

    def _rows_behind_transfer(self, weights: Share) -> int:
        return int(_FREE_ROWS * self._streamed_part(weights))

    def _streamed_part(self, weights: Share) -> float:
        """The part of all weights' unencoded bytes that a sweep transfers over the link."""
        sharing = self.demand.sharing
        return self.shape.stored_part * (100 - weights.gpu) / 100 / (sharing.count if sharing.gather else 1)

    def _brings_cache(self) -> bool:
        """Whether keys and values that are not on the device are transferred there during the computation."""
        return not self.on_cpu and not self.policy.cpu_cache_compute

    def _rows_between_fetches(self, rows_per_batch: int) -> int | None:
        if not self._brings_cache():
            return None
        if self.shape.is_mixture:  # a few rows of each expert would cost as much as many
            return rows_per_batch
        return max(_LEAST_BETWEEN_FETCHES, int(_OPERATIONS_BETWEEN_FETCHES / self.demand.row_operations))

    def _admission(self, weights: Share) -> Admission | None:
        """How many prompt rows are admitted at once; None where the weights come from a disk, slower than the link.

        There a further sweep would cost more than it hides.
        """
        if self.on_cpu or weights.disk > 0 or not self.shape.cache_row_bytes:
            return None
        shape = self.shape
        row_bytes = shape.cache_row_bytes * self.demand.stored_row_bytes() / shape.cache_layer_row_bytes
        crossing = row_bytes if self._brings_cache() else 0.0
        return Admission(
            rows_beside_weights=_ADMITTED_ROWS * self._streamed_part(weights),
            rows_beside_cached_row=_ADMITTED_ROWS * shape.stored_part * crossing / shape.weight_bytes,
        )

    def _scores_per_batch(self, rows: int, left: int) -> int | None:
        """The limit of a micro-batch's attention scores: more would not fit in any case.

        It is never less than a micro-batch of one sequence of `rows` rows needs.
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
        budgets |= {"device": self.demand.growing(budgets["device"]), "host": self.demand.growing(budgets["host"])}
        return {tier: max(0, budgets[tier]) if is_used[tier] else 0 for tier in TIERS}

    def _activations(self, left: dict[Tier, int], rows: int) -> Share:
        """The device, if it has space for the hidden states of at least one micro-batch; else the larger tier."""
        on_device, on_host = Share(gpu=100, cpu=0), Share(gpu=0, cpu=100)
        room = self.demand.hidden_rows(on_device, left)
        if self.memory.shared or room >= min(rows, self.demand.hidden_rows(on_host, left)):
            return on_device
        return on_host

    def _greedy_weights(self) -> Share:
        shape, memory, bytes_of = self.shape, self.memory, self.demand.weights
        kept = self.demand.needed(SMALL_BATCH_ROWS) + self.demand.reserve(0)
        if self.demand.device_weights(Share(gpu=100, cpu=0)) + kept <= self.demand.device_room(100):
            return Share(gpu=100, cpu=0)
        slots = self.demand.slots(Share(gpu=0, cpu=100)) + shape.outer_bytes + self.demand.expanded
        rest = self.demand.device_room(0) - slots
        rows = self.demand.rows_per_batch(rest)
        room: float = rest - self.demand.needed(rows)
        room -= self.demand.reserve(room)
        gpu = int(max(0.0, min(99.0, 100 * room / bytes_of.of_one(100))))
        host = memory.host - (self.demand.sharing.count * self.demand.device_room(0) if memory.shared else 0)
        cpu = int(max(0.0, min(100.0 - gpu, 100 * 0.9 * host / bytes_of.on_host(100))))
        if gpu + cpu < 100 and self.policy.offload_dir is None:
            self.fit.check_transit(Share(gpu=0, cpu=100))
            raise CapacityError(
                f"weights {gb(shape.weight_bytes)} exceed what device ({gb(memory.device)}) and host "
                f"({gb(host)}) hold; set offload-dir to let {100 - gpu - cpu} % of them go to disk"
            )
        return Share(gpu=gpu, cpu=cpu, disk=100 - gpu - cpu)
