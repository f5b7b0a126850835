"""FreeToken itself, through its own offline class `LLM`: experts stream from host memory into a cache on the card.

    python -m benchmarks.rivals.freetoken --checkout DIR --shape qwen3-30b-a3b --row 1x64x0+512:32 --gpu-memory 16GB \
        --batch-size 64 [--moe-backend offload]

DIR is a checkout of FlashML-org/FreeToken whose two extensions are built in place; beside it, it needs the packages
apache-tvm-ffi, flashlib and pyzmq. Nothing of it is changed on disk. Set from outside at run time: its dummy weights,
of the standard normal distribution in its own code, are a fiftieth of that, as everybody's are here; there is no
tokenizer. `--batch-size` is its most requests at once, which its own default sets to 4. Answers are sampled, as they
are for `flexgen-helm bench`: the repetitive greedy ones of random weights would find their experts in the cache.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals.contender import finish, limit_device, parser, stopwatch, task_of
from flexgen_helm.planning.dummy import shape_config


class NoTokenizer:
    """The part of a tokenizer that its scheduler uses: prompts and answers stay token ids."""

    eos_token_id = None

    def decode(self, _: list[int]) -> str:
        """No text."""
        return ""


def scale_weights(engine: Any, weight: Any) -> None:
    """Make its dummy weights small random numbers."""
    make_state, pinned = engine._make_dummy_weight_state_dict, weight.alloc_pinned_tensor

    def state(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        made = make_state(*args, **kwargs)
        return {key: 0.02 * value if value.is_floating_point() else value for key, value in made.items()}

    def experts(config: Any, *, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        block = 0.02 * torch.randn(2 * inner, hidden, generator=torch.Generator().manual_seed(0))

        def banks(rows: int, columns: int) -> list[torch.Tensor]:
            of_one = block.flatten()[: rows * columns].view(rows, columns).to(dtype)
            return [pinned(config.num_experts, rows, columns, dtype=dtype).copy_(of_one) for _ in range(num_layers)]

        num_layers = config.num_layers
        return banks(2 * inner, hidden), banks(hidden, inner)

    engine._make_dummy_weight_state_dict = state
    weight.dummy_moe_expert_sources = experts


def free_of(limit: int, device: torch.device) -> int:
    """Bytes that would be free on a GPU of `limit` bytes."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, limit - (total - free))


def checkpoint_of(shape: str, folder: Path) -> None:
    """Write the part of a checkpoint that it reads: its configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = shape_config(shape)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Run the task."""
    flags = parser(__doc__)
    flags.add_argument("--checkout", type=Path, required=True)
    flags.add_argument("--moe-backend", default="auto", help="auto, offload, hybrid or cpu")
    options = flags.parse_args()
    task = task_of(options, enforce=False)  # its engine must be the first to initialize CUDA
    if not torch.cuda.is_available():
        raise SystemExit("FreeToken needs a CUDA device")
    if task.cut is not None:
        raise SystemExit("FreeToken's answers are whole: leave out --cut")
    sys.path.insert(0, str(options.checkout / "python"))
    import freetoken.engine.engine as engine
    import freetoken.models.weight as weight
    import freetoken.scheduler.scheduler as scheduler
    from freetoken.core import SamplingParams
    from freetoken.llm import LLM

    scale_weights(engine, weight)
    scheduler.load_tokenizer = lambda _: NoTokenizer()
    if task.gpu_memory is not None:
        engine.get_free_memory = partial(free_of, task.gpu_memory)
    requests, new = task.load.num_requests, task.load.new
    seats = min(requests, task.batch_size or 4)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_of(task.shape, Path(folder))
        llm = LLM(
            folder,
            use_dummy_weight=True,
            moe_backend=options.moe_backend,
            moe_cache_auto=True,
            max_running_req=seats,
            cuda_graph_bs=[seats],
            kv_reserve_tokens=seats * (task.length + new + 1),
            max_seq_len_override=task.length + new + 1,
        )
    limit_device(task.gpu_memory)
    setup_s = time.perf_counter() - start
    config, slots = llm.engine.config, llm.engine.config.moe_cache_size
    print(f"{config.moe_backend}: {slots} experts on the card, after {setup_s:.1f} s", flush=True)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        done = llm.generate(prompts, SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens))
        made = [len(each["token_ids"]) for each in done]
        assert made == [tokens] * len(prompts), made

    others = task.load.prompts(config.model_config.vocab_size, seed=1)[:seats]  # it caches prefixes
    generate(others, 2)
    print("warm", flush=True)
    count = math.ceil(requests / seats)
    measured = min(task.batches or count, count)
    prompts = task.prompts[: measured * seats]
    prefill = stopwatch(lambda: generate(task.load.prompts(config.model_config.vocab_size, seed=2)[:seats], 1))
    seconds = stopwatch(lambda: generate(prompts, new))
    finish(
        task,
        seconds * requests / len(prompts),
        projected=measured < count,
        setup_s=setup_s,
        batch_size=seats,
        measured_batches=measured,
        measured_tokens=new,
        prefill_s_of_a_batch=prefill,
        moe_backend=config.moe_backend,
        attention=config.attention_backend,
        experts_on_card=slots,
        experts=config.model_config.num_experts * config.model_config.num_moe_layers,
    )


if __name__ == "__main__":
    main()
