"""The device memory of a draft model, next to the model that it drafts for (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.errors import CapacityError
from engine.memory.tiers import Memory, Tier
from engine.planning.demand import LEAST_BATCH_ROWS, SMALL_BATCH_ROWS, Demand
from engine.planning.fit import gb
from engine.planning.limits import RECORDED_BYTES, RECORDED_ROWS, Limits
from engine.planning.model_shape import ModelShape
from engine.planning.sharing import Sharing
from engine.policy import Policy, Share

_ROWS = {"cpu": SMALL_BATCH_ROWS, "other": 1024}
"""The rows of a draft model's micro-batches: the model is small, so more rows save little."""
_LOGITS_BYTES = 32 << 20
"""The most bytes of a chunk of its logits: each sequence needs one row."""
_MOST_PART = 0.75
"""The most that the draft's cache may take of the device memory that the model leaves to its KV cache, where the
model's can be elsewhere: a draft's keys and values save more transfers there than the model's."""
_ROUNDS = 20
"""The number of fixed-point iterations; each leaves less than half of the error."""
_DEVICE = Share(gpu=100, cpu=0)
DRAFT_POLICY = Policy(weights=_DEVICE, kv_cache=_DEVICE, activations=_DEVICE)
"""The policy of a draft model: everything on the device."""


@dataclass(frozen=True)
class DraftRoom:
    """Divides a device's memory between a model and its draft."""

    shape: ModelShape
    draft: ModelShape
    policy: Policy
    memory: Memory
    """The memory available to both."""
    on_cpu: bool
    sharing: Sharing

    @property
    def least(self) -> int:
        """The device memory for the draft's weights and workspace."""
        return self._needed(0)

    def with_cache(self, device: int, budgets: Mapping[Tier, int]) -> int:
        """`least`, and a KV cache for as many tokens as the model's, as far as the device has space for them.

        In addition to `least`, the model's cache may have `budgets`, and could have so many bytes of the `device`.
        """
        own, draft = self.shape.cache_row_bytes, self.draft.cache_row_bytes
        part = draft / (own + draft)
        if budgets["device"] == sum(budgets.values()) > 0:
            return self._needed(int(device * part))
        return self._needed(int(min(max(_MOST_PART, part) * device, max(device, sum(budgets.values())) * part)))

    def refusal(self) -> CapacityError:
        """Why there is no space for a draft next to a model that fits alone."""
        demand = Demand(self.shape, self.policy, self.memory, on_cpu=self.on_cpu, sharing=self.sharing)
        weights = self.policy.weights or Share(gpu=0, cpu=100)
        device = demand.device_room(weights.gpu)
        left = device - demand.device_weights(weights) - demand.work(LEAST_BATCH_ROWS)
        return CapacityError(
            f"draft-model: its weights {gb(self.draft.weight_bytes)}, with the work on them {gb(self.least)}, exceed "
            f"the {gb(max(0, left))} that the model leaves of {gb(device)} of device memory; take a smaller draft, "
            "raise gpu-memory, or leave fewer weights on the device"
        )

    @property
    def _rows(self) -> int:
        return _ROWS["cpu" if self.on_cpu else "other"]

    def _needed(self, cache_bytes: int) -> int:
        """The device memory for the draft's weights, workspace, and so many bytes of keys and values."""
        room = self.draft.weight_bytes + cache_bytes
        for _ in range(_ROUNDS):
            room = self._beside_cache(room) + cache_bytes
        return room

    def _beside_cache(self, room: int) -> int:
        """The part of so much device memory that is not for the draft's keys and values."""
        demand = Demand(self.draft, DRAFT_POLICY, self.alone(room), on_cpu=self.on_cpu)
        logits = self._logits_bytes(room)
        work = demand.work(self._rows) - demand.work(0) + demand.work(0) * logits // demand.logits_bytes()
        kept = demand.overhead(self._rows) - (demand.staged(self._rows) if self.draft.reads_in_place else 0)
        recorded = 0 if self.on_cpu else RECORDED_ROWS * self.draft.work_row_bytes + RECORDED_BYTES
        hidden = 2 * self._rows * (self.draft.hidden_row_bytes + self.draft.handed_row_bytes)
        return demand.device_weights(_DEVICE) + work + kept + recorded + hidden

    def _logits_bytes(self, room: int) -> int:
        return min(_LOGITS_BYTES, max(room // 16, 1 << 20))

    def without(self, num_bytes: int) -> Memory:
        """The memory that is left next to a draft of so many bytes."""
        memory = replace(self.memory, device=max(0, self.memory.device - num_bytes))
        if not memory.shared:
            return memory
        return replace(memory, host=max(0, memory.host - self.sharing.count * num_bytes))

    def alone(self, num_bytes: int) -> Memory:
        """Memory of so many device bytes, for the draft alone."""
        return Memory(device=num_bytes, host=num_bytes, disk=0, shared=self.memory.shared)

    def cache_bytes(self, num_bytes: int) -> int:
        """The part of so much device memory that is for the draft's keys and values."""
        demand = Demand(self.draft, DRAFT_POLICY, self.alone(num_bytes), on_cpu=self.on_cpu)
        return max(0, demand.growing(num_bytes - self._beside_cache(num_bytes)))

    def limits(self, found: Limits, num_bytes: int) -> Limits:
        """The draft's limits in so much memory; `found` are those in more memory."""
        rows = self._rows
        demand = Demand(self.draft, DRAFT_POLICY, self.alone(num_bytes), on_cpu=self.on_cpu)
        return replace(
            found,
            rows_per_batch=rows,
            rows_per_piece=rows,
            rows_per_sweep=2 * rows,
            cached_rows_per_batch=max(1, demand.staged(rows) // demand.gathered_row_bytes()),
            scores_per_batch=None if found.scores_per_batch is None else rows * rows,
            logits_bytes=self._logits_bytes(num_bytes),
            waiting_rows=0,
        )
