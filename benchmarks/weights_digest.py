"""The cost of the weight files' digest at a start: `python -m benchmarks.weights_digest --gigabytes 26 --folder DIR`.

Writes a Llama checkpoint of random numbers (safetensors shards) into DIR and starts an engine on it, alternately with a
digest to compute and with one kept from an earlier start, with files on disk (cold) and in the page cache (warm). A
start is from `Engine.from_pretrained` until the last weight is in place; `digest_s` is until the digest is known. Also
measures the disk's rate by direct reads, and the rate of the digest alone, of files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.cold_start import drop_from_page_cache, shards
from engine import Engine, Policy
from engine.checkpoint.identity import kept_digests
from engine.checkpoint.identity.weight_digest import weights_digest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.measuring.disk_rates import read_rate
from flexgen_helm.commands.bench import bench_policy
from flexgen_helm.planning.dummy import write_model_directory
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
_HIDDEN, _INNER, _VOCABULARY = 4096, 11008, 32000
_LAYERS_PER_SHARD = 12
_BYTES = 2
"""Bytes of a float16 number."""


def layer_shapes(number: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder layer's parameters, by name."""
    start, square, wide = f"model.layers.{number}", (_HIDDEN, _HIDDEN), (_INNER, _HIDDEN)
    return {
        **{f"{start}.self_attn.{name}_proj.weight": square for name in "qkvo"},
        **{f"{start}.mlp.{name}_proj.weight": wide for name in ("gate", "up")},
        f"{start}.mlp.down_proj.weight": (_HIDDEN, _INNER),
        **{f"{start}.{name}_layernorm.weight": (_HIDDEN,) for name in ("input", "post_attention")},
    }


def outer_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the other parameters, by name."""
    table = (_VOCABULARY, _HIDDEN)
    return {"model.embed_tokens.weight": table, "model.norm.weight": (_HIDDEN,), "lm_head.weight": table}


def num_bytes_of(shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes of parameters in float16."""
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * _BYTES


def layers_for(num_bytes: float) -> int:
    """Decoder layers of a model of about `num_bytes`, at least one."""
    return max(1, round((num_bytes - num_bytes_of(outer_shapes())) / num_bytes_of(layer_shapes(0))))


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a Llama of so many layers with random numbers, and the other files that the engine needs."""
    config = {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16"},
        **{"hidden_size": _HIDDEN, "intermediate_size": _INNER, "vocab_size": _VOCABULARY},
        **{"num_hidden_layers": num_layers, "num_attention_heads": 32, "max_position_embeddings": 2048},
        "tie_word_embeddings": False,
    }
    shape = folder / "shape.json"
    shape.write_text(json.dumps(config), encoding="utf-8")
    write_model_directory(str(shape), folder)
    shape.unlink()
    random = torch.Generator().manual_seed(0)
    groups = [outer_shapes()]
    for first in range(0, num_layers, _LAYERS_PER_SHARD):
        numbers = range(first, min(num_layers, first + _LAYERS_PER_SHARD))
        groups.append({name: shape for number in numbers for name, shape in layer_shapes(number).items()})
    places: dict[str, str] = {}
    for number, shapes in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        state = {
            key: torch.randint(-(2**13), 2**13, shape, dtype=torch.int16, generator=random).view(torch.float16)
            for key, shape in shapes.items()
        }
        save_file(state, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shapes, name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def start(folder: Path, policy: Policy, *, digest_is_kept: bool) -> dict[str, float]:
    """Seconds of an engine's start, and until the digest of its weights is known."""
    file = kept_digests.KeptDigests(folder).file
    if not digest_is_kept:
        file.unlink(missing_ok=True)
    begin = time.perf_counter()
    with Engine.from_pretrained(str(folder), policy) as engine:
        engine.wait_until_loaded()
        loaded_s = time.perf_counter() - begin
        engine.weights_digest()
        digest_s = time.perf_counter() - begin
    if not file.exists():
        raise SystemExit("the digest is not kept: the files are too new; wait two seconds and start again")
    return {"loaded_s": loaded_s, "digest_s": digest_s}


def rounds(folder: Path, policy: Policy, count: int, *, cold: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield starts with and without the digest, alternately; the first of each is included."""
    for number in range(count):
        kinds = (True, False) if number % 2 else (False, True)
        for is_kept in kinds:
            if cold:
                drop_from_page_cache(shards(folder))
            found = start(folder, policy, digest_is_kept=is_kept)
            kind = "without_digest" if is_kept else "with_digest"
            print(f"{'cold' if cold else 'warm'} {kind}: loaded in {found['loaded_s']:.2f} s, ", end="")
            print(f"digest known after {found['digest_s']:.2f} s", flush=True)
            yield kind, found


def figures(found: list[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    """All starts, their medians, and how much longer those with the digest took."""
    told: dict[str, Any] = {kind: [each for other, each in found if other == kind] for kind, _ in found}
    medians = {kind: median(each["loaded_s"] for each in starts) for kind, starts in told.items()}
    return {**told, "median_s": medians, "ratio": medians["with_digest"] / medians["without_digest"]}


def digest_seconds(folder: Path) -> float:
    """Seconds of the digest alone, of files in the page cache."""
    kept_digests.KeptDigests(folder).file.unlink(missing_ok=True)
    source = OpenedWeights(folder)
    begin = time.perf_counter()
    try:
        weights_digest(folder, source)
        return time.perf_counter() - begin
    finally:
        source.close()


def main() -> None:
    """Write, start alternately, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=26.0, help="size of the checkpoint (26)")
    parser.add_argument("--folder", type=Path, required=True, help="new, on the disk to be measured; removed")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind (3)")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--percent", nargs=6, type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    policy = replace(bench_policy(options.policy, options.gpu_memory, options.percent), dtype="float16")
    options.folder.mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(options.folder / "cache")
    try:
        num_layers = layers_for(options.gigabytes * 1e9)
        begin = time.perf_counter()
        write_checkpoint(options.folder, num_layers)
        files = shards(options.folder)
        num_bytes = sum(file.stat().st_size for file in files)
        print(f"{num_bytes / 1e9:.2f} GB in {len(files)} shards written in {time.perf_counter() - begin:.1f} s")
        drop_from_page_cache(files)
        time.sleep(kept_digests.SETTLED_NS / 1e9)
        cold_rate = read_rate(files, most_bytes=8 << 30)
        start(options.folder, policy, digest_is_kept=False)  # what a process does only once is not counted
        cold = figures(list(rounds(options.folder, policy, options.rounds, cold=True)))
        start(options.folder, policy, digest_is_kept=True)  # fills the page cache
        warm = figures(list(rounds(options.folder, policy, options.rounds, cold=False)))
        alone_s = digest_seconds(options.folder)
    finally:
        shutil.rmtree(options.folder)
    content = {
        "checkpoint_bytes": num_bytes,
        "policy": policy.as_mapping(),
        "disk_bytes_s": cold_rate,
        "read_bytes_s": {kind: num_bytes / seconds for kind, seconds in cold["median_s"].items()},
        "digest_bytes_s": num_bytes / alone_s,
        "cold": cold,
        "warm": warm,
    }
    print(f"disk {cold_rate / 1e9:.2f} GB/s by direct reads; digest alone {num_bytes / alone_s / 1e9:.2f} GB/s")
    for name, each in (("cold", cold), ("warm", warm)):
        rates = {kind: num_bytes / seconds / 1e9 for kind, seconds in each["median_s"].items()}
        print(
            f"{name} start: {rates['without_digest']:.2f} GB/s without the digest, "
            f"{rates['with_digest']:.2f} GB/s with it: {each['ratio']:.3f} x the time"
        )
    print(write_record(f"weights-digest-{round(num_bytes / 1e9)}GB", content, options.out))


if __name__ == "__main__":
    main()
