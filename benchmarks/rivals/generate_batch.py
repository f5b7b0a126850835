"""Continuous batching of `transformers`, by the loop of its `generate_batch`: a model that fits on the GPU.

It uses the GPU's free memory for keys and values and runs all requests to their end, after a rehearsal of two tokens
each: nothing is limited or projected. Its attention is FlashAttention if that package is installed, else `sdpa`; the
result says which. Not every family supports it: OPT does not in version 5.24.
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
    release()  # the next one uses the free memory
    found = continuous(model, task.prompts, [task.load.new] * requests, math.inf)
    finish(task, found["seconds"], projected=False, setup_s=setup_s, attention=found["attention"])


if __name__ == "__main__":
    main()
