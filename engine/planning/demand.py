"""The bytes that the parts of a run take of each tier, under a policy (pure)."""

from __future__ import annotations

from dataclasses import replace

from engine.memory.disk.file import BLOCK, align_up
from engine.memory.tiers import Memory, Tier, percents
from engine.planning.limits import GATHER_SLOTS, LOGITS_BYTES, READ_AHEAD_BYTES, SLOTS, STAGING_BUFFERS, WAITING_BATCHES
from engine.planning.model_shape import ModelShape
from engine.planning.sharing import ALONE, Sharing, WeightBytes
from engine.policy import Policy, Share

_ROWS = {"cpu": (1024, 512, 256, 128, 64), "other": (8192, 4096, 2048, 1024, 512, 256, 128, 64)}
_MORE_ROWS = (32768, 16384)
"""More rows, for small layers on an accelerator: else a micro-batch ends before the host has launched the next."""
_MOST_OPERATIONS = 1e12
"""The most operations on such a micro-batch in a layer: 1.5 ms of a fast GPU, about the host's launch time."""
_WORK_FRACTION = 0.3
"""The share of the device memory left by the weights that a micro-batch's temporaries may take."""
_LOGITS_COPIES = {"cpu": 4, "other": 3}
"""The number of chunks of float32 logits held at once: raw, as log-probabilities, and for checks or sorting."""
_MOST_OWN_ROWS = 4096
"""The most rows of a prompt longer than a micro-batch for which the CPU reserves memory, where prompts can be cut."""
_BESIDE_ROW_BYTES = 2048
"""Host memory per row in addition to its hidden state: its rotary tables, and its job and completion."""
_EXPANDED_PART = 0.5
"""The share of the device memory left by weights, layers in transit and a small micro-batch in which a layer may be
decoded whole, once a sweep. Otherwise experts are decoded some at a time, and again for each micro-batch."""
_TRANSIT_PART = 0.5
"""The share of the device memory left by the weights that layers in transit may take. If they need more, experts are
transferred separately."""
_WAITING_PART = 0.5
"""The share of the device memory left by weights and a micro-batch's temporaries for micro-batches that wait for
others at a layer's experts; where experts are transferred separately, a sweep has no more rows than that."""
_WAITING_ROWS = 32768
"""The number of waiting rows for which a greedy plan reserves memory. Resident weights save less than decoding all
experts another time costs."""
_CACHE_RESERVE = 0.06
"""The share of device memory that a greedy plan reserves for the KV cache when weights would take everything."""
_THREAD_BYTES = 32 << 20
"""The memory that a GPU's libraries keep for each thread that multiplies."""
_FRAGMENTATION = 0.04
"""The share of device memory that the allocator may hold without being able to use it."""
_MOST_HIDDEN_ROWS = 1 << 17
"""The most rows whose hidden states a sweep keeps: ten times as many as are computed while all weights arrive; more
would save next to nothing."""
_BEHIND_DISK = 4
"""The number of micro-batches on their way to or from the disk."""
_STATE_COPIES = 7
"""The number of copies of a state while a token is added: the old one, the input of the new one, and that of a
prefix that others continue."""
LEAST_BATCH_ROWS, SMALL_BATCH_ROWS = _ROWS["cpu"][-1], _ROWS["cpu"][-2]
"""The rows of the smallest micro-batch of a plan, and of the one for which a greedy plan reserves memory."""


class Demand:
    """The memory that a model, its workspace and its buffers take under a policy, and what a tier has left for them.

    With several engines that share the weights, figures are those of one engine, unless stated otherwise.
    """

    def __init__(
        self, shape: ModelShape, policy: Policy, memory: Memory, *, on_cpu: bool, sharing: Sharing = ALONE
    ) -> None:
        self.shape, self.policy, self.memory, self.on_cpu = shape, policy, memory, on_cpu
        self.sharing = sharing
        self.weights = WeightBytes(shape, sharing)
        self.experts_apart = False
        share = self._likely_share()
        most = max(shape.least_expanded_bytes, _EXPANDED_PART * self._left(share))
        self.expands_whole = shape.expanded_bytes <= most
        """Whether encoded experts are decoded with their layer, once a sweep; otherwise some at a time, when used."""
        can_wait = not (self.expands_whole or sharing.gather or on_cpu or policy.batch_invariant)
        room = self.device_room(share.gpu) - self.weights.of_one(share.gpu)
        self.experts_apart = can_wait and self.slots(share) > _TRANSIT_PART * room
        """Whether those are also transferred some at a time, since layers in transit would take too much memory."""

    def with_weights(self, weights: Share) -> Demand:
        """The demand under other shares of the weights."""
        policy = replace(self.policy, weights=weights)
        return Demand(self.shape, policy, self.memory, on_cpu=self.on_cpu, sharing=self.sharing)

    @property
    def row_bytes(self) -> int:
        """The bytes of one row's temporaries inside a layer."""
        return (self.on_cpu and self.shape.cpu_work_row_bytes) or self.shape.work_row_bytes

    def _likely_share(self) -> Share:
        """The policy's shares of weights; without any, all on the device where they fit, else none."""
        resident = Share(gpu=100, cpu=0)
        fits = self._left(resident) >= self.shape.least_expanded_bytes
        return self.policy.weights or (resident if fits else Share(gpu=0, cpu=100))

    def _left(self, weights: Share) -> int:
        """The device memory that these weights leave for decoded layers, with a small micro-batch reserved."""
        return self.device_room(weights.gpu) - self._kept_weights(weights) - self.needed(SMALL_BATCH_ROWS)

    def device_room(self, gpu: float) -> int:
        """The bytes of the device tier when `gpu` percent of the weights are there.

        Where device and host memory are the same, the engines share it; weights there are counted once.
        """
        count, memory = self.sharing.count, self.memory
        if not memory.shared or count == 1:
            return memory.device
        once = 0 if self.sharing.has_own else self.weights.of_one(gpu)
        return min(memory.device, (memory.host + (count - 1) * once) // count)

    def host_left(self, weights: Share) -> int:
        """The host memory that the weights leave for one engine."""
        left = (self.memory.host - self.weights.on_host(weights.cpu)) // self.sharing.count
        left -= self.read_ahead(weights)
        return left - self._on_host_too(weights) if self.memory.shared else left

    def disk_left(self, weights: Share) -> int:
        """The disk space that the weights leave for one engine."""
        return (self.memory.disk - self.weights.on_disk(weights.disk)) // self.sharing.count

    def _on_host_too(self, weights: Share) -> int:
        """One engine's part of the device tier's bytes where device and host memory are the same."""
        own, count = self.weights.of_one(weights.gpu), self.sharing.count
        return self.device_weights(weights) - own + (own if self.sharing.has_own else -(-own // count))

    def read_ahead(self, weights: Share) -> int:
        """The staging memory for weights on disk: at most their size, and at most half of the memory that is left."""
        left = max(0, self.rooms(weights.gpu)["host"] - self.weights.on_host(weights.cpu)) // self.sharing.count
        return min(READ_AHEAD_BYTES, left // 2 // BLOCK * BLOCK, align_up(self.weights.of_one(weights.disk)))

    def slots(self, weights: Share) -> int:
        if self.sharing.gather:
            return GATHER_SLOTS * max(self.shape.unit_bytes)
        if weights.gpu >= 100:
            return 0
        # A parameter cut by the border passes through the slot whole: at most one per unit, so at most a unit.
        return SLOTS * (self.shape.apart_bytes if self.experts_apart else max(self.shape.unit_bytes))

    @property
    def expanded(self) -> int:
        """The device memory into which encoded layers are decoded, workspace included."""
        return self.shape.expanded_bytes if self.expands_whole else self.shape.least_expanded_bytes

    def waiting_rows(self, left: int, rows: int) -> int:
        """The rows that wait for each other; `left` is the device memory left by weights and temporaries.

        None where layers are decoded whole, under `batch-invariant` (its mode is per thread), on the CPU and where it
        computes attention (each computing thread there has further ones), and where two micro-batches of so many `rows`
        do not fit.
        """
        if not self._can_wait:
            return 0
        room = int(_WAITING_PART * left) - WAITING_BATCHES * _THREAD_BYTES
        found = room // max(1, self.shape.waiting_row_bytes)
        return found if found >= 2 * rows else 0

    @property
    def _can_wait(self) -> bool:
        on_host = self.on_cpu or self.policy.cpu_cache_compute
        return not (self.expands_whole or on_host or self.policy.batch_invariant)

    def reserve(self, left: float) -> float:
        """The memory that a greedy plan reserves for the KV cache and waiting rows, of what temporaries leave."""
        kept = _CACHE_RESERVE * self.memory.device
        if not self._can_wait:
            return kept
        return max(kept, min(self.waiting(_WAITING_ROWS) / _WAITING_PART, left))

    def waiting(self, rows: int) -> int:
        """The memory that so many waiting rows take."""
        return rows * self.shape.waiting_row_bytes + WAITING_BATCHES * _THREAD_BYTES if rows else 0

    def device_weights(self, weights: Share) -> int:
        return self._kept_weights(weights) + self.expanded

    def _kept_weights(self, weights: Share) -> int:
        """The device memory that stored weights take."""
        outer = self.shape.outer_bytes if weights.gpu < 100 else 0
        return self.weights.of_one(weights.gpu) + self.slots(weights) + outer

    def work(self, rows: int, left: int | None = None) -> int:
        """The memory to compute so many rows, logits included; `left` is the device memory left by weights, if any."""
        return rows * self.row_bytes + self._logits_copies * self.logits_bytes(left)

    @property
    def _logits_copies(self) -> int:
        return _LOGITS_COPIES["cpu" if self.on_cpu else "other"]

    def needed(self, rows: int, left: int | None = None) -> int:
        """The device memory that micro-batches of so many rows take without the weights, which leave `left` of it."""
        return self.work(rows, left) + self.overhead(rows)

    def staged(self, rows: int) -> int:
        """The most bytes that keys and values of a micro-batch's decode steps may take on the device."""
        return max(self.work(rows) // 2, min(64 << 20, self.memory.device // 16))

    def stored_row_bytes(self) -> int:
        """The bytes of a layer's row of the KV cache on host or disk."""
        return max(1, self.shape.coded_layer_row_bytes or self.shape.cache_layer_row_bytes)

    def states_at_once(self, rows: int) -> int:
        """The number of sequences whose states a layer updates at once, with a micro-batch of so many rows.

        It is 0 without states. Under `batch-invariant` they are updated one by one.
        """
        one = (STAGING_BUFFERS + _STATE_COPIES) * self.shape.state_layer_bytes
        at_once = self.staged(rows) // one if one and not self.policy.batch_invariant else 1
        return max(1, at_once) if one else 0

    def gathered_row_bytes(self) -> int:
        """The bytes of a row that attention gathers: in staging buffers, decoded, and concatenated."""
        shape = self.shape
        num_copies = (shape.coded_layer_row_bytes > 0) + (not shape.reads_in_place) + 2 * self.policy.batch_invariant
        return max(1, STAGING_BUFFERS * self.stored_row_bytes() + num_copies * shape.cache_layer_row_bytes)

    def overhead(self, rows: int) -> int:
        """The memory for staging buffers, gaps left by an accelerator's allocator, and states being updated."""
        states = _STATE_COPIES * self.states_at_once(rows) * self.shape.state_layer_bytes
        return states + (0 if self.on_cpu else self.staged(rows) + int(_FRAGMENTATION * self.memory.device))

    def behind_disk(self, rows: int) -> int:
        """The host memory for transfers of the cache and of hidden states to and from the disk.

        It holds micro-batches in each direction, in blocks that an allocator rounds up to powers of two.
        """
        cache, hidden = self.policy.kv_cache, self.policy.activations
        may_be_there = self.policy.offload_dir is not None and (cache is None or cache.disk > 0)
        kept = self.staged(rows) if may_be_there else 0
        if hidden is not None and hidden.disk > 0:
            kept += rows * self.shape.hidden_row_bytes
        return _BEHIND_DISK * kept

    def logits_bytes(self, left: int | None = None) -> int:
        """The bytes of one chunk of logits: a share of the device, or, on the CPU, of what weights leave, if known.

        Weights often take most of the host's memory, and logits compete there with the KV cache.
        """
        return min(LOGITS_BYTES, max((self.memory.device if left is None or not self.on_cpu else left) // 16, 1 << 20))

    def with_logits(self, num_bytes: int) -> int:
        """The least device memory that holds `num_bytes` and the logits, which grow with it up to a limit."""
        copies = self._logits_copies
        growing = max(num_bytes * 16 // (16 - copies) + 1, num_bytes + (copies << 20))
        return min(growing, num_bytes + copies * LOGITS_BYTES)

    @property
    def row_operations(self) -> float:
        """The approximate number of operations on one row in a layer: two per weight of two bytes."""
        return self.shape.weight_bytes / self.shape.stored_part / len(self.shape.unit_bytes)

    def rows_per_batch(self, left: int, *, is_resident: bool = False) -> int:
        """The rows of a micro-batch whose temporaries fit into `left`; more for small layers that are resident."""
        choices = _ROWS["cpu" if self.on_cpu else "other"]
        if is_resident and not self.on_cpu:
            more = (rows for rows in _MORE_ROWS if rows * self.row_operations <= _MOST_OPERATIONS)
            choices = (*more, *choices)
        fitting = [rows for rows in choices if rows * self.row_bytes <= _WORK_FRACTION * max(0, left)]
        return fitting[0] if fitting else choices[-1]

    def own_rows(self, rows: int, left: int) -> int:
        """The rows of the largest micro-batch that memory is reserved for; `rows` is its size if it can be cut."""
        if not self.on_cpu:
            return rows
        most = int(_WORK_FRACTION * max(0, left)) // self.row_bytes
        return max(rows, min(_MOST_OWN_ROWS, most))

    def beside_rows(self, rows: int) -> int:
        """The device memory per sweep row in addition to its hidden state."""
        under_way = self.sharing.num_handed_on * self.shape.hidden_row_bytes
        return rows * (self.shape.handed_row_bytes + under_way + (_BESIDE_ROW_BYTES if self.on_cpu else 0))

    def growing(self, cache_bytes: int) -> int:
        """The size that a KV cache of at most so many bytes may reach: a layer's table is copied when it grows."""
        if not self.on_cpu:
            return cache_bytes
        shape = self.shape
        kinds = (shape.cache_row_bytes, shape.cache_layer_row_bytes), (shape.state_bytes, shape.state_layer_bytes)
        return min((cache_bytes * whole // (whole + layer) for whole, layer in kinds if whole), default=cache_bytes)

    def hidden_rows(self, activations: Share, left: dict[Tier, int]) -> int:
        # Of a mixture, more rows are computed while its weights arrive, and their hidden states are small.
        fraction = {"device": 0.5 if self.shape.is_mixture and not self.on_cpu else 0.25, "host": 0.5, "disk": 0.5}
        rows = [
            max(0, left[tier]) * fraction[tier] / (self.shape.hidden_row_bytes * percent / 100)
            for tier, percent in percents(activations).items()
            if percent > 0
        ]
        if beside := self.beside_rows(1):
            rows.append(max(0, left["device"]) * fraction["device"] / beside)
        return max(1, int(min([*rows, _MOST_HIDDEN_ROWS])))

    def rooms(self, gpu: float) -> dict[Tier, int]:
        """The bytes of weights that each tier can hold when `gpu` percent are on the device; host and disk: of all."""
        share = Share(gpu=gpu, cpu=100 - gpu)
        transit, work = self.device_weights(share) - self.weights.of_one(gpu), self.work(LEAST_BATCH_ROWS)
        taken = self.sharing.count * (self._on_host_too(share) + work) if self.memory.shared else 0
        return {
            "device": self.device_room(gpu) - transit - work,
            "host": self.memory.host - taken,
            "disk": self.memory.disk,
        }
