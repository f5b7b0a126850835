"""Time from files on disk to the first results: `python -m benchmarks.cold_start --shape opt-13b --folder DIR`.

Writes a checkpoint of random numbers (safetensors shards) into DIR, drops it from the page cache, opens the engine from
it and runs one workload. The limit is the checkpoint's bytes divided by the disk's rate, measured in the same call by
direct reads (O_DIRECT, one and several threads) of the same files, after the engine has read them.

With `--compress-weight`, the first start encodes the weights and keeps them (in DIR, too), and a second start reads the
encoded weights from disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from engine import Engine, Policy
from engine.measuring.disk_rates import read_rate
from engine.weights.encoded.kept import weights_directory
from flexgen_helm.commands.bench import bench_policy, timed
from flexgen_helm.planning.dummy import random_model, shape_name, write_model_directory
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent
_THREADS = (1, 8)


def write_checkpoint(shape: str, folder: Path) -> int:
    """Write random weights of `shape` and the other files that the engine needs; returns the bytes of the shards."""
    model = random_model(shape)
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder, max_shard_size="5GB")
    del model
    write_model_directory(shape, folder)
    return sum(file.stat().st_size for file in shards(folder))


def shards(folder: Path) -> list[Path]:
    """The weight files."""
    return sorted(folder.glob("*.safetensors"))


def drop_from_page_cache(files: list[Path]) -> None:
    """Write the files to disk and drop their pages from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cold_start(folder: Path, policy: Policy, row: Workload) -> dict[str, float]:
    """Time an engine's start in `folder` and a workload after it, in seconds; `closed_s` includes all writing."""
    start = time.perf_counter()
    with Engine.from_pretrained(str(folder), policy) as engine:
        open_s = time.perf_counter() - start  # weights may still be loading: the workload begins meanwhile
        print(f"opened in {open_s:.2f} s", flush=True)
        first_s, sweeps = timed(engine, row)
        cold_s = time.perf_counter() - start
        print(f"first row done after {cold_s:.2f} s", flush=True)
        warm_s, _ = timed(engine, row)
    return {
        "open_s": open_s,
        "first_row_s": first_s,
        "first_row_sweeps": sweeps,
        "cold_s": cold_s,
        "warm_row_s": warm_s,
        "closed_s": time.perf_counter() - start,
    }


def main() -> None:
    """Write, drop, open and run; print and record the times next to the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-13b")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; emptied at the end")
    parser.add_argument("--row", type=Workload.parse, default="1x100x400+100:1")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--percent", nargs=6, type=int)
    parser.add_argument("--compress-weight", type=int, choices=(4, 8))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    policy = bench_policy(options.policy, options.gpu_memory, options.percent)
    if options.compress_weight:
        policy = replace(policy, compress_weight=options.compress_weight)
        os.environ["XDG_CACHE_HOME"] = str(options.folder / "cache")
    options.folder.mkdir(parents=True)  # must not exist: it is removed at the end
    try:
        start = time.perf_counter()
        num_bytes = write_checkpoint(options.shape, options.folder)
        write_s = time.perf_counter() - start
        files = shards(options.folder)
        print(f"{num_bytes / 1e9:.2f} GB in {len(files)} shards written in {write_s:.1f} s", flush=True)
        drop_from_page_cache(files)
        first = cold_start(options.folder, policy, options.row)
        kept = sorted(weights_directory().glob("*/*")) if policy.compress_weight else []
        drop_from_page_cache([*files, *kept])
        second = cold_start(options.folder, policy, options.row) if kept else {}
        drop_from_page_cache(files)
        sizes = [file.stat().st_size for file in kept]
        rates = {threads: read_rate(files, most_bytes=8 << 30, num_threads=threads) for threads in _THREADS}
    finally:
        shutil.rmtree(options.folder)
    limit_s = num_bytes / max(rates.values())
    content = {
        "shape": options.shape,
        "row": str(options.row),
        "policy": policy.as_mapping(),
        "checkpoint_bytes": num_bytes,
        "disk_bytes_s": {str(threads): rate for threads, rate in rates.items()},
        **first,
        "limit_s": limit_s,
        "cold_over_limit": first["cold_s"] / limit_s,
    }
    if second:
        content["kept_bytes"] = kept_bytes = sum(sizes)
        content["second_start"] = {**second, "limit_s": kept_bytes / max(rates.values())}
    disk = ", ".join(f"{rate / 1e9:.2f} GB/s with {threads} threads" for threads, rate in rates.items())
    print(f"disk: {disk}; limit {limit_s:.2f} s")
    print(f"{first['cold_s'] / limit_s:.2f} x the limit; ", end="")
    print(f"the same row warm {first['warm_row_s']:.3f} s")
    print(write_record(f"cold-start-{shape_name(options.shape)}", content, options.out))


if __name__ == "__main__":
    main()
