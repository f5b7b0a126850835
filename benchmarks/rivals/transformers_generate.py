"""Plain `transformers`: a model that fits on the GPU, `generate` in batches as large as fit.

With `--batch-size 1`, one request at a time, as HELM's own Hugging Face client runs them (with scores).
"""

from __future__ import annotations

import time

import torch

from benchmarks.rivals.contender import device, finish, parser, task_of
from benchmarks.rivals.generating import sequence_bytes, time_generate
from flexgen_helm.planning.dummy import random_model


def main() -> None:
    """Run the task."""
    task = task_of(parser(__doc__).parse_args())
    start = time.perf_counter()
    model = random_model(task.shape).to(device())
    setup_s = time.perf_counter() - start
    batch_size = task.batch_size
    if batch_size is None:
        room = 0
        if torch.cuda.is_available():
            free = torch.cuda.mem_get_info()[0]
            room = free if task.gpu_memory is None else task.gpu_memory - torch.cuda.memory_reserved()
        batch_size = max(1, min(task.load.num_requests, int(0.85 * room / sequence_bytes(task))))
    scores = {"output_scores": True, "return_dict_in_generate": True} if batch_size == 1 else {}
    seconds, detail = time_generate(model, task, batch_size, **scores)
    finish(task, seconds, setup_s=setup_s, **detail)


if __name__ == "__main__":
    main()
