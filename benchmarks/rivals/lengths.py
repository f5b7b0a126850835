"""Answers of many lengths by `transformers`: continuous batching, and `generate` one batch at a time."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.rivals.contender import device, stopwatch
from engine.errors import EngineError


def continuous(model: Any, prompts: list[list[int]], lengths: list[int], limit_s: float) -> dict[str, Any]:
    """Run the loop of `generate_batch`; its graphs are captured before the clock starts.

    It is stopped after `limit_s` seconds. Its rate is then that of the time in which most sequences run together.
    """
    from transformers import GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(
        max_prompt_length=max(map(len, prompts)), max_generated_length=max(lengths), num_requests=len(prompts)
    )
    left = len(prompts)
    made = 0
    with model.continuous_batching_context_manager(
        generation_config=config, block=True, timeout=5, workload_hints=hints
    ) as manager:
        start = time.perf_counter()
        for prompt, most in zip(prompts, lengths, strict=True):
            manager.add_request(input_ids=prompt, max_new_tokens=most, eos_token_id=-1)
        while left and time.perf_counter() < start + limit_s:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise EngineError("the continuous batching of transformers ended by itself")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise EngineError(f"the continuous batching of transformers: {result.error}")
                left, made = left - 1, made + len(result.generated_tokens)
        seconds = time.perf_counter() - start
        attention = model.config._attn_implementation
        if left:
            running = manager.batch_processor.scheduler.active_requests
            made += sum(len(state.generated_tokens) for state in list(running.values()))
            manager.stop(block=True, hard_stop=True)
            return {"seconds": seconds, "tokens_s": made / seconds, "attention": attention, "left": left}
    if made != sum(lengths):
        raise EngineError(f"the continuous batching of transformers made {made} tokens instead of {sum(lengths)}")
    return {"seconds": seconds, "tokens_s": made / seconds, "attention": attention}


def batches(
    model: Any, prompts: list[list[int]], lengths: list[int], size: int, limit_s: float, cut: int
) -> dict[str, Any]:
    """Run `generate`, batch by batch; batches after `limit_s` seconds are projected from the steps that they take.

    The steps of a batch after the first `cut` ones are projected too, though their contexts are longer.
    """

    def generate(first: int, most: int) -> None:
        ids = torch.tensor(prompts[first : first + size], device=device())
        mask = torch.ones_like(ids)
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
            )
        assert made.shape[1] == ids.shape[1] + most

    steps = [max(lengths[first : first + size]) for first in range(0, len(prompts), size)]
    generate(0, 2)
    seconds, measured, num_steps = 0.0, 0, 0
    while measured < len(steps) and (not measured or seconds < limit_s):
        most = min(steps[measured], cut)
        seconds += stopwatch(lambda at=measured, most=most: generate(at * size, most))
        measured, num_steps = measured + 1, num_steps + most
    whole = seconds * sum(steps) / num_steps
    return {
        "seconds": whole,
        "tokens_s": sum(lengths) / whole,
        "batch_size": size,
        "batches": len(steps),
        "measured_batches": measured,
        "steps": sum(steps),
        "measured_steps": num_steps,
        "projected": num_steps < sum(steps),
    }
