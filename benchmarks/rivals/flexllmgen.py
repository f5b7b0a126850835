"""FlexLLMGen itself, driven as its own `flex_opt.py` drives it: `OptLM.generate` with a policy and dummy weights.

    python -m benchmarks.rivals.flexllmgen --checkout DIR --shape opt-30b --row 1x64x0+512:32 --gpu-memory 16GB \
        --percent 20 80 0 100 0 100 --gpu-batch-size 32 --num-gpu-batches 2 --cpu-cache-compute --cut 3

DIR is a checkout of FMInference/FlexLLMGen, of which only the folder `flexllmgen` is needed. Nothing of it is changed
on disk. Set from outside at run time: its dummy weights, all ones in its own code, are random numbers here as
everybody's are (constant operands let a card clock higher); prompts are random token ids, so no tokenizer is loaded.
`--cut` is its own `cut_gen_len`, projected by its own `project_decode_latency`. It needs a CUDA device: its streams and
copy threads have no other form. Only OPT shapes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals.contender import finish, parser, task_of


class RandomOnes:
    """NumPy, except that `ones` gives small random numbers: a view of one block, which holds the largest weight."""

    def __init__(self, num_elements: int) -> None:
        block = np.random.default_rng(0).standard_normal(min(num_elements, 1 << 24), dtype=np.float32)
        repeats = -(-num_elements // len(block))
        self._block = np.tile((0.02 * block).astype(np.float16), repeats)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def ones(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """`[shape]` random numbers of `dtype`; read only by the caller."""
        return self._block[: int(np.prod(shape))].reshape(shape).astype(dtype, copy=False)


def environment(checkout: Path, offload_dir: str) -> tuple[Any, Any]:
    """(`flex_opt`, its environment), whose copy threads run until they are told to close."""
    sys.path.insert(0, str(checkout))
    import flexllmgen.flex_opt as flex_opt

    gpu, cpu, disk = flex_opt.TorchDevice("cuda:0"), flex_opt.TorchDevice("cpu"), flex_opt.TorchDisk(offload_dir)
    mixed = flex_opt.TorchMixedDevice([gpu, cpu, disk])
    return flex_opt, flex_opt.ExecutionEnv(gpu=gpu, cpu=cpu, disk=disk, mixed=mixed)


def build(flex_opt: Any, env: Any, name: str, flags: Any) -> Any:
    """The model, with FlexLLMGen's own defaults where no flag says otherwise."""
    config = flex_opt.get_opt_config(name)
    flex_opt.np = RandomOnes(max(config.vocab_size, 4 * config.input_dim) * config.input_dim)
    groups = [flex_opt.CompressionConfig(num_bits=4, group_size=64, group_dim=dim, symmetric=False) for dim in (0, 2)]
    policy = flex_opt.Policy(
        flags.gpu_batch_size,
        flags.num_gpu_batches,
        *flags.percent,
        overlap=True,
        sep_layer=True,
        pin_weight=bool(flags.pin_weight),
        cpu_cache_compute=flags.cpu_cache_compute,
        attn_sparsity=1.0,
        compress_weight=flags.compress_weight,
        comp_weight_config=groups[0],
        compress_cache=flags.compress_cache,
        comp_cache_config=groups[1],
    )
    return flex_opt.OptLM(config, env, flex_opt.DUMMY_WEIGHT, policy)


def main() -> None:
    """Run the task."""
    flags = parser(__doc__)
    flags.add_argument("--checkout", type=Path, required=True)
    flags.add_argument("--percent", type=int, nargs=6, default=[20, 80, 0, 100, 0, 100])
    flags.add_argument("--gpu-batch-size", type=int, required=True)
    flags.add_argument("--num-gpu-batches", type=int, required=True)
    flags.add_argument("--pin-weight", type=int, default=1)
    for flag in ("--cpu-cache-compute", "--compress-weight", "--compress-cache"):
        flags.add_argument(flag, action="store_true")
    options = flags.parse_args()
    task = task_of(options)
    if not torch.cuda.is_available():
        raise SystemExit("FlexLLMGen needs a CUDA device")
    block = options.gpu_batch_size * options.num_gpu_batches
    prompts = np.array(task.prompts, dtype=np.int32)
    if len(prompts) % block:
        raise SystemExit(f"{len(prompts)} requests are no multiple of a block of {block}")
    cut = None if options.cut is None or options.cut + 1 >= task.load.new else options.cut + 1
    seconds, measured = 0.0, 0
    with tempfile.TemporaryDirectory() as offload_dir:
        flex_opt, env = environment(options.checkout, offload_dir)
        try:
            start = time.perf_counter()
            model = build(flex_opt, env, options.shape, options)
            setup_s = time.perf_counter() - start
            print(f"weights in place after {setup_s:.1f} s", flush=True)
            model.generate(prompts[:block, :32], max_new_tokens=1)
            print("warm", flush=True)
            for first in range(0, len(prompts), block)[: options.batches]:
                flex_opt.timers("generate").reset()
                model.generate(prompts[first : first + block], max_new_tokens=task.load.new, cut_gen_len=cut)
                costs = flex_opt.timers("generate").costs
                decode = flex_opt.project_decode_latency(costs, task.length, task.load.new) if cut else sum(costs[1:])
                print(f"prefill {costs[0]:.2f} s, {len(costs) - 1} decode steps {sum(costs[1:]):.2f} s", flush=True)
                seconds, measured = seconds + float(costs[0] + decode), measured + 1
        finally:
            env.close_copy_threads()
    blocks = len(prompts) // block
    finish(
        task,
        seconds * blocks / measured,
        projected=cut is not None or measured < blocks,
        setup_s=setup_s,
        batch_size=block,
        measured_batches=measured,
        measured_tokens=cut or task.load.new,
        percent=options.percent,
        cpu_cache_compute=options.cpu_cache_compute,
    )


if __name__ == "__main__":
    main()
