"""Hugging Face Accelerate: a device map that fills the GPU and leaves the rest in host memory, then `generate`.

The map is Accelerate's own (`infer_auto_device_map`), with the GPU's share chosen so that a batch's keys and values,
its temporaries and two layers in transit also fit.
"""

from __future__ import annotations

import time

import torch
from accelerate import dispatch_model, infer_auto_device_map

from benchmarks.rivals.contender import finish, parser, task_of
from benchmarks.rivals.generating import sequence_bytes, time_generate
from flexgen_helm.planning.dummy import random_model

_LIBRARIES_BYTES = 1 << 30


def main() -> None:
    """Run the task."""
    task = task_of(parser(__doc__).parse_args())
    if not torch.cuda.is_available():
        raise SystemExit("Accelerate's offloading needs a CUDA device")
    limit = task.gpu_memory or int(0.9 * torch.cuda.mem_get_info()[0])
    start = time.perf_counter()
    model = random_model(task.shape)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    blocks = set(model._no_split_modules or [])
    layers = [m for m in model.modules() if type(m).__name__ in blocks]
    layer = max(sum(p.numel() * p.element_size() for p in m.parameters()) for m in layers)
    batch_size = task.batch_size or max(1, min(task.load.num_requests, int(0.4 * limit / sequence_bytes(task))))
    card = max(0, limit - batch_size * sequence_bytes(task) - 2 * max(layer, max(sizes)) - _LIBRARIES_BYTES)
    device_map = infer_auto_device_map(
        model, max_memory={0: card, "cpu": 1 << 50}, no_split_module_classes=sorted(blocks), dtype=model.dtype
    )
    on_card = sum(where == 0 for where in device_map.values())
    print(
        f"{on_card} of {len(device_map)} parts on the card ({card / 1e9:.1f} GB), batches of {batch_size}", flush=True
    )
    model = dispatch_model(model, device_map, main_device=0)
    setup_s = time.perf_counter() - start
    seconds, detail = time_generate(model, task, batch_size)
    finish(task, seconds, setup_s=setup_s, parts_on_card=on_card, parts=len(device_map), **detail)


if __name__ == "__main__":
    main()
