"""Times `generate` of a `transformers` model, batch after batch, and projects what was not measured."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.rivals.contender import Task, device, stopwatch
from flexgen_helm.planning.dummy import shape_config


def cache_row_bytes(config: dict[str, Any]) -> int:
    """Bytes of a token's keys and values in all layers, in a 2-byte dtype."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * 2 * int(config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim)


def work_row_bytes(config: dict[str, Any]) -> int:
    """Approximate bytes of temporaries for a prompt token inside a layer."""
    inner = config.get("ffn_dim") or config.get("intermediate_size") or 4 * config["hidden_size"]
    return 2 * int(8 * config["hidden_size"] + 3 * inner)


def sequence_bytes(task: Task) -> int:
    """Approximate bytes of GPU memory for one sequence of a batch."""
    config = shape_config(task.shape)
    return (task.length + task.load.new) * cache_row_bytes(config) + task.length * work_row_bytes(config)


def time_generate(model: Any, task: Task, batch_size: int, **kwargs: Any) -> tuple[float, dict[str, Any]]:
    """Seconds for the whole workload, and how they were obtained; `kwargs` go to `generate`."""
    prompts, new, where = task.prompts, task.load.new, device()
    cut = new - 1 if task.cut is None else min(task.cut, new - 1)

    def generate(batch: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(batch, device=where)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **kwargs
            )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        assert sequences.shape == (len(batch), len(batch[0]) + tokens), sequences.shape

    while True:  # warm-up: kernels are chosen, memory is allocated; halves an estimate that was too high
        try:
            generate(prompts[:batch_size], 2)
            break
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            torch.cuda.empty_cache()
            print(f"out of memory; batches of {batch_size}", flush=True)
    count = math.ceil(len(prompts) / batch_size)
    measured = min(task.batches or count, count)
    batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)][:measured]
    print(f"warm; {measured} of {count} batches of {batch_size}, {1 + cut} of {new} tokens", flush=True)
    seconds = 0.0
    for index, batch in enumerate(batches):
        if cut == new - 1:
            seconds += stopwatch(lambda batch=batch: generate(batch, new))
        else:
            prefill = stopwatch(lambda batch=batch: generate(batch, 1))
            rest = stopwatch(lambda batch=batch: generate(batch, 1 + cut)) - prefill
            seconds += prefill + max(rest, 0.0) / cut * (new - 1) if cut else prefill
        print(f"batch {index + 1}: {seconds:.2f} s so far", flush=True)
    requests = sum(map(len, batches))
    return seconds * len(prompts) / requests, {
        "batch_size": batch_size,
        "measured_batches": measured,
        "measured_tokens": 1 + cut,
        "projected": cut < new - 1 or measured < count,
    }
