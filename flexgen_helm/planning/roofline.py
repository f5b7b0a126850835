"""The least time for work on a machine: the bytes to move and operations to compute, over the measured rates."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.job import Job, Sampling
from flexgen_helm.planning.sizes import Sizes

if TYPE_CHECKING:
    import torch

    from engine.memory.tiers import Tier
    from engine.planning.limits import Limits
    from engine.planning.planner import Plan

_EXPANDING_PASSES = 3
"""Times that the numbers of an encoded layer are written or read until they can be multiplied with (codec.py)."""
_WORKLOAD = re.compile(r"(\d+)x(\d+)x(\d+)\+(\d+):(\d+)")


@dataclass(frozen=True)
class Workload:
    """`num_runs` HELM-like runs of `num_jobs` requests each, written "RUNSxJOBSxSHARED+OWN:NEW"."""

    num_runs: int
    num_jobs: int
    shared: int
    """Prompt tokens that the requests of one run have in common."""
    own: int
    """Prompt tokens of a request's own."""
    new: int
    """Tokens to generate."""

    @classmethod
    def parse(cls, text: str) -> Workload:
        """The workload that `text` writes; `ConfigError` otherwise."""
        match = _WORKLOAD.fullmatch(text)
        if match is None:
            raise ConfigError(f"workload {text!r} is not RUNSxJOBSxSHARED+OWN:NEW, such as 1x100x400+100:1")
        workload = cls(*map(int, match.groups()))
        if min(workload.num_runs, workload.num_jobs, workload.own, workload.new) < 1:
            raise ConfigError(f"workload {text!r}: every number but SHARED must be at least 1")
        return workload

    def __str__(self) -> str:
        return f"{self.num_runs}x{self.num_jobs}x{self.shared}+{self.own}:{self.new}"

    @property
    def num_requests(self) -> int:
        """The number of all requests."""
        return self.num_runs * self.num_jobs

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that must be computed, a shared prefix once."""
        return self.num_runs * (self.shared + self.num_jobs * self.own)

    @property
    def kept(self) -> int:
        """Rows that a request keeps in the KV cache; of one new token, none."""
        return self.own + self.new - 1 if self.new > 1 else 0

    def part_of(self, count: int) -> Workload:
        """What the busiest of `count` devices gets: whole runs where there are enough, else requests of one."""
        if self.num_runs >= count:
            return replace(self, num_runs=math.ceil(self.num_runs / count))
        return replace(self, num_runs=1, num_jobs=math.ceil(self.num_requests / count))

    def prompts(self, vocabulary: int, seed: int = 0) -> list[list[int]]:
        """Random prompts, equal within a run for the first `shared` tokens."""
        rng = random.Random(seed)
        prompts = []
        for _ in range(self.num_runs):
            prefix = [rng.randrange(5, vocabulary) for _ in range(self.shared)]
            for _ in range(self.num_jobs):
                prompts.append(prefix + [rng.randrange(5, vocabulary) for _ in range(self.own)])
        return prompts

    def jobs(self, vocabulary: int, seed: int = 0) -> list[Job]:
        """The prompts as jobs, sampled: greedy answers of random weights repeat themselves, and drafts would profit."""
        return [
            Job(prompt=prompt, max_new_tokens=self.new, sampling=Sampling(temperature=1.0, seed=index))
            for index, prompt in enumerate(self.prompts(vocabulary, seed))
        ]

    def rehearsal(self, seats: int) -> Workload:
        """The same requests with all but the last tokens in the prompt: needs the same memory in fewer sweeps.

        Whole runs that would wait, given the most sequences that run at once, are left out.
        """
        if self.new <= 2:
            return self
        num_runs = min(self.num_runs, math.ceil(seats / self.num_jobs))
        return Workload(num_runs, self.num_jobs, self.shared, self.own + self.new - 2, 2)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least work of a workload, under a plan."""

    sweeps: int
    flop: float
    to_device_bytes: float
    from_device_bytes: float
    device_bytes: float
    """Weights, keys and values that computation reads from device memory."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine was measured to do."""

    flop_s: float
    """The operations per second of a large square matrix product on random numbers, in the current dtype."""
    to_device_bytes_s: float
    from_device_bytes_s: float
    device_bytes_s: float
    """Bytes read and written per second by a large copy within device memory."""


def _rows_at_once(load: Workload, limits: Limits) -> int:
    """Rows of the longest part of a prompt that is computed at once: prompts may be cut into pieces."""
    longest = max(load.shared, load.own)
    return min(longest, limits.rows_per_piece or longest)


def work_of(load: Workload, sizes: Sizes, plan: Plan, *, cache_crosses: bool = True, most_sweeps: int = 0) -> Work:
    """The least work of `load` under `plan`; without `cache_crosses`, attention to offloaded KV is computed in place.

    `most_sweeps`: a number of sweeps that was seen to be enough; 0 for none.

    It is deliberately a lower bound: a shared prefix is computed and stored once and always on the device, causal
    attention is counted half, every sweep is as full as the plan allows, copies in both directions overlap.
    """
    steps, kept, limits = load.new - 1, load.kept, plan.limits
    at_once, off_device = _concurrency(load.num_requests, kept, sizes, plan)
    sweeps = max(
        math.ceil(load.num_requests / at_once) * load.new,
        math.ceil(load.prefill_tokens / max(limits.rows_per_sweep, _rows_at_once(load, limits))) + steps,
    )
    if load.own > limits.rows_per_sweep and load.own == _rows_at_once(load, limits):  # let in alone, when nobody runs
        sweeps = max(sweeps, load.num_requests * load.new)
    sweeps = min(sweeps, most_sweeps or sweeps)
    moved = load.num_requests * off_device * sizes.cache_row_bytes
    past_rows = sum(load.own + step for step in range(steps))  # of a sequence, over its decode steps
    tokens = load.prefill_tokens + load.num_requests * steps
    hidden = tokens * sizes.hidden_row_bytes * sizes.num_layers * (1 - plan.activations.gpu / 100)
    shared_rows = load.num_runs * load.shared * steps
    states = states_moved(load, sizes, plan)
    at_once_rows = max(plan.limits.rows_per_batch, plan.limits.waiting_rows)
    batches = sweeps if plan.expands_whole else max(sweeps, math.ceil(tokens / at_once_rows))
    expanded = sweeps * (sizes.expanded_bytes - sizes.expert_bytes) + batches * sizes.expert_bytes
    return Work(
        sweeps=sweeps,
        flop=2.0 * sizes.layer_parameters * tokens
        + 2.0 * sizes.head_parameters * load.num_requests * load.new
        + 2.0 * sizes.attention_width * _attended_pairs(load),
        to_device_bytes=sweeps * sizes.streamed_bytes + hidden + (moved * past_rows if cache_crosses else 0) + states,
        from_device_bytes=hidden + moved * kept + states + load.num_requests * off_device * sizes.state_bytes,
        device_bytes=sweeps * sizes.sweep_bytes
        + _EXPANDING_PASSES * expanded
        + (load.num_requests * (1 - off_device) * past_rows + shared_rows) * sizes.device_cache_row_bytes
        + 2.0 * load.num_requests * steps * sizes.state_bytes,
    )


def num_at_once(load: Workload, sizes: Sizes, plan: Plan) -> int:
    """Sequences of `load` that run at once under `plan`."""
    return _concurrency(load.num_requests, load.kept, sizes, plan)[0]


def num_off_device(load: Workload, sizes: Sizes, plan: Plan) -> float:
    """Sequences of `load`, on the whole, whose keys and values are kept off the device."""
    return load.num_requests * _concurrency(load.num_requests, load.kept, sizes, plan)[1]


def cache_rows(sizes: Sizes, plan: Plan) -> dict[Tier, int]:
    """The tokens of one sequence whose keys and values fit each tier, next to its states."""
    row_bytes = dict.fromkeys(plan.cache_budgets, sizes.cache_row_bytes) | {"device": sizes.device_cache_row_bytes}
    return {
        tier: max(0, budget - sizes.state_bytes) // max(1, row_bytes[tier])
        for tier, budget in plan.cache_budgets.items()
    }


def cached_sequences(kept: int, sizes: Sizes, plan: Plan) -> dict[Tier, int]:
    """The number of sequences, with so many cached tokens each, that fit each tier."""
    row_bytes = dict.fromkeys(plan.cache_budgets, sizes.cache_row_bytes) | {"device": sizes.device_cache_row_bytes}
    return {
        tier: budget // max(1, kept * row_bytes[tier] + sizes.state_bytes)
        for tier, budget in plan.cache_budgets.items()
    }


def states_moved(load: Workload, sizes: Sizes, plan: Plan) -> float:
    """Bytes of states that decode steps bring to the device, and as many back."""
    return num_off_device(load, sizes, plan) * sizes.state_bytes * (load.new - 1)


def _concurrency(num_requests: int, kept: int, sizes: Sizes, plan: Plan) -> tuple[int, float]:
    """(sequences that can run at once, share of them whose keys and values are off the device)."""
    at_once = min(num_requests, plan.limits.seats)
    if not kept:
        return at_once, 0.0
    room = cached_sequences(kept, sizes, plan)
    at_once = max(1, min(at_once, sum(room.values())))
    if plan.kv_cache is not None:
        return at_once, 1 - plan.kv_cache.gpu / 100
    return at_once, max(0, at_once - room["device"]) / at_once


def _attended_pairs(load: Workload) -> float:
    """Pairs of a query and a key before it, over all computed tokens."""

    def causal(first: int, count: int) -> float:
        return count * first + count * (count + 1) / 2

    per_request = causal(load.shared, load.own + load.new - 1)
    return load.num_runs * causal(0, load.shared) + load.num_requests * per_request


def least_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Seconds that each resource needs for `work`; the largest is the limit."""
    return {
        "arithmetic": work.flop / rates.flop_s,
        "to device": work.to_device_bytes / rates.to_device_bytes_s,
        "from device": work.from_device_bytes / rates.from_device_bytes_s,
        "device memory": work.device_bytes / rates.device_bytes_s,
    }


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure `device`; on the CPU, link and device memory are both a copy in host memory."""
    from engine.measuring import rates
    from engine.memory import accelerator

    is_fast = accelerator.has_streams(device)
    size = 1 << (30 if is_fast else 26)
    to_device, from_device, _ = rates.link_rates(device, size)
    return Rates(
        flop_s=rates.gemm_rate(device, dtype, *([8192] * 3 if is_fast else [1024] * 3)),
        to_device_bytes_s=to_device,
        from_device_bytes_s=from_device,
        device_bytes_s=rates.device_copy_rate(device, size),
    )
