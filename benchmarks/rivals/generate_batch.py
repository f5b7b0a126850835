"""Continuous batching of `transformers`, the loop of its `generate_batch`: a model that fits the card, whole.

It takes the card's free memory for its keys and values and runs all requests to their end, after a rehearsal of two
tokens each: nothing is limited or projected. Its attention is FlashAttention where that package is installed, and
`sdpa` elsewhere; the result tells which it was. Not every family has it: OPT does not in version 5.24.
"""

from __future__ import annotations

import math
import time

from benchmarks.rivals.contender import device, finish, parser, release, task_of
from benchmarks.rivals.lengths import continuous
from flexgen_helm.planning.dummy import random_model


def main() -> None:
    """Run the task."""
    task = task_of(parser(__doc__).parse_args())
    for name in ("gpu_memory", "batch_size", "cut", "batches"):
        if getattr(task, name) is not None:
            raise SystemExit(f"generate_batch has no limits: leave out --{name.replace('_', '-')}")
    start = time.perf_counter()
    model = random_model(task.shape).to(device())
    setup_s = time.perf_counter() - start
    requests = len(task.prompts)
    continuous(model, task.prompts, [2] * requests, math.inf)
    release()  # the next one takes what is free
    found = continuous(model, task.prompts, [task.load.new] * requests, math.inf)
    finish(task, found["seconds"], projected=False, setup_s=setup_s, attention=found["attention"])


if __name__ == "__main__":
    main()
