"""Runs a few prompts sweep by sweep, without the engine's thread: `python examples/one_sweep.py MODEL_DIRECTORY`.

This is what `engine.Engine` does for its callers. Read it from top to bottom: open, load, schedule, compute, advance.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from engine import Completion, Job, Policy
from engine.advance import advance
from engine.checkpoint.description import describe
from engine.opening import fill_from, open_parts
from engine.schedule.sequence import Sequence
from engine.text.completion import completion_of


def completions(model: str, policy: Policy, prompts: list[str]) -> Iterator[Completion]:
    """Yield the completion of each prompt, in the order in which they end."""
    # Open: the plan fits the policy to the memory at hand; nothing of the weights has been read yet.
    description = describe(model)
    parts = open_parts(description, policy, fill_from(description, policy))
    try:
        # Load: one parameter a step. The engine does this in a thread of its own, while the first sweep runs.
        for _ in parts.loading:
            pass
        jobs = [Job(prompt=parts.tokenizer(prompt)["input_ids"], max_new_tokens=8) for prompt in prompts]
        parts.scheduler.add(Sequence.of(job) for job in jobs)
        while not parts.scheduler.is_idle:
            # Schedule: which spans ride in this sweep, cut into micro-batches.
            batches = parts.scheduler.next_sweep()
            # Compute: all micro-batches through one layer, then the next layer; logits only where they are asked for.
            answers = parts.executor.sweep(batches)
            # Advance: sequences get their next tokens, or end; those that ended leave, and others may enter.
            advance(batches, answers, parts.text)
            done = [sequence for sequence in parts.scheduler.running if sequence.is_done]
            parts.scheduler.finish(done)
            yield from (completion_of(sequence, parts.text) for sequence in done)
    finally:
        parts.close()


if __name__ == "__main__":
    texts = ["The capital of France is", "The capital of France is not", "1 + 1 ="]
    for done in completions(sys.argv[1], Policy.load("auto"), texts):
        print(repr(done.text))
