"""DeepSpeed ZeRO-Inference: ZeRO stage 3 with parameters in page-locked host memory, then `generate`.

Needs the package `deepspeed` (a pure-Python wheel will do: `DS_BUILD_OPS=0 pip wheel --no-deps deepspeed`), with
`hjson` and `pydantic` in addition to torch's dependencies. It keeps no share of the weights on the GPU, and no keys and
values off it.
"""

from __future__ import annotations

import os
import time

import torch

from benchmarks.rivals.contender import finish, parser, task_of
from benchmarks.rivals.generating import sequence_bytes, time_generate
from flexgen_helm.planning.dummy import random_model


def main() -> None:
    """Run the task."""
    task = task_of(parser(__doc__).parse_args())
    if not torch.cuda.is_available():
        raise SystemExit("ZeRO-Inference needs a CUDA device")
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    start = time.perf_counter()
    model = random_model(task.shape)
    hidden = model.config.hidden_size
    layer = 12 * hidden * hidden * 2
    config = {
        "bf16" if model.dtype == torch.bfloat16 else "fp16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": layer // 2,  # elements: one layer
            "stage3_param_persistence_threshold": hidden,
            "stage3_max_live_parameters": 4 * layer // 2,
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 1,
    }
    keep = HfDeepSpeedConfig(config)  # while it exists, `generate` knows that parameters are partitioned
    deepspeed.init_distributed("nccl", rank=0, world_size=1)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)  # else the whole model goes to the GPU first
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.module.eval()
    setup_s = time.perf_counter() - start
    limit = task.gpu_memory or int(0.9 * torch.cuda.mem_get_info()[0])
    table = model.config.vocab_size * hidden * 2
    room = limit - 4 * layer - 2 * table
    batch_size = task.batch_size or max(1, min(task.load.num_requests, int(0.9 * room / sequence_bytes(task))))
    seconds, detail = time_generate(engine.module, task, batch_size, synced_gpus=False)
    finish(task, seconds, setup_s=setup_s, deepspeed=deepspeed.__version__, **detail)
    del keep


if __name__ == "__main__":
    main()
