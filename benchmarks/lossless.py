"""The cost of lossless weights: `python -m benchmarks.lossless` - decoding on the device, encoding on the host.

Matrices of Llama-3-8B's sizes with normal random numbers. The decoding rate is given in bytes of numbers written per
second, next to the rate of a large copy within device memory (bytes read and written per second) in the same process,
and as a fraction of what the copy's rate allows: a number takes 1.51 bytes read and 2 bytes written.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from engine.kernels.weight_codes import lossless
from engine.kernels.weight_codes.lossless import Lossless
from engine.measuring.rates import device_copy_rate, median_seconds
from engine.memory import accelerator
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))


def encode(values: torch.Tensor) -> torch.Tensor:
    """Return the encoded bytes of a parameter, in host memory."""
    codec = Lossless()
    stored = torch.zeros(codec.num_weight_bytes(values), dtype=torch.uint8)
    for first, part in codec.encoded("matrix", values, 0, values.flatten(), values.device):
        stored[first : first + len(part)] = part
    return stored


def time_matrix(shape: tuple[int, int], device: torch.device, copy_rate: float) -> dict[str, object]:
    """Bits per number, and rates in bytes of numbers per second."""
    values = (torch.randn(shape) * 0.02).bfloat16()
    encode(values)  # loads what the first call loads
    start, cpu = time.perf_counter(), time.process_time()
    stored = encode(values)
    encode_s, core_s = time.perf_counter() - start, time.process_time() - cpu
    ranges = Lossless().weight_ranges(values, 0, values.numel())
    on_device = stored.to(device)
    parts, found = [on_device[first:end] for first, end in ranges], torch.empty_like(values, device=device)
    expand_s = median_seconds(lambda: Lossless().decode_parts(parts, found.view(-1)), device)
    assert found.cpu().view(torch.int16).equal(values.view(torch.int16))
    return {
        "bits": len(stored) * 8 / values.numel(),
        "encoded_bytes_s": values.nbytes / encode_s,
        "encoded_bytes_s_a_core": values.nbytes / core_s,
        "expanded_bytes_s": values.nbytes / expand_s,
        "of_copy": (values.nbytes + len(stored)) / expand_s / copy_rate,
    }


def main() -> None:
    """Time each matrix; print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1, help="divide both sides of the matrices by it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    device = accelerator.devices()[0] if accelerator.devices() else torch.device("cpu")
    copy_rate = device_copy_rate(device, (1 << 30) // options.shrink**2)
    print(f"copy within device memory {copy_rate / 1e12:.3f} TB/s", flush=True)
    found = {}
    for rows, columns in SHAPES:
        shape = rows // options.shrink, columns // options.shrink
        found[f"{shape[0]}x{shape[1]}"] = timed = time_matrix(shape, device, copy_rate)
        print(f"{shape}: {timed}", flush=True)
    assert not lossless._fill._fails
    print(write_record("lossless", {"device_copy_bytes_s": copy_rate, "matrices": found}, options.out))


if __name__ == "__main__":
    main()
