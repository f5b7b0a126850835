"""Runs a few prompts sweep by sweep, without the engine's thread: `python examples/one_sweep.py MODEL_DIRECTORY`.

This is what `engine.Engine` does for its callers. Read it from top to bottom: open, load, schedule, compute, advance.
"""

from __future__ import annotations

import sys

from engine import Completion, Job, Policy
from engine.advance import advance
from engine.checkpoint.description import describe
from engine.opening import open_parts
from engine.schedule.sequence import Sequence
from engine.text.completion import completion_of
from engine.weights.encoded.filling import fill_from


def completions(model: str, policy: Policy, prompts: list[str]) -> list[Completion]:
    """Return the completion of each prompt."""
    # Open: the plan fits the policy to the memory at hand. No weight has been read yet.
    description = describe(model)
    parts = open_parts(description, policy, fill_from(description, policy))
    lane = parts.lanes[0]
    try:
        # Load: one parameter a step. The engine does this in a thread of its own, while the first sweep runs.
        for _ in parts.loading:
            pass
        jobs = [Job(prompt=parts.tokenizer(prompt)["input_ids"], max_new_tokens=8) for prompt in prompts]
        sequences = [Sequence.of(job) for job in jobs]
        # The scheduler finds the prefixes that the prompts share.
        lane.scheduler.add(sequences)
        while not lane.scheduler.is_idle:
            # Schedule: decide which rows of which sequences take part in this sweep, and cut them into micro-batches.
            batches = lane.scheduler.next_sweep()
            # Compute: all micro-batches through one layer, then through the next; logits only where they are needed.
            answers = lane.executor.sweep(batches)
            # Advance: sequences get their next tokens, or end. Those that ended leave, so that others may enter.
            advance(batches, answers, parts.text)
            lane.scheduler.finish([sequence for sequence in lane.scheduler.running if sequence.is_done])
        return [completion_of(sequence, parts.text) for sequence in sequences]
    finally:
        parts.close()


if __name__ == "__main__":
    texts = ["The capital of France is", "The capital of France is not", "1 + 1 ="]
    for text, done in zip(texts, completions(sys.argv[1], Policy.load("auto"), texts), strict=True):
        print(f"{text!r} -> {done.text!r}")
