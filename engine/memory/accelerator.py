"""Device abstraction: streams, memory and page-locking of CUDA, ROCm, XPU and MPS. Only this file calls torch.cuda.

ROCm's torch calls its devices and functions `cuda`. XPU has the same functions under its own name; neither of them nor
MPS, which has no streams for concurrent copies, could be tested where this was written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

_WITH_STREAMS = ("cuda", "xpu")
_ON_CPU = "DefaultCPUAllocator: "
"""Parts of torch's error messages for failed allocations of host memory."""
_LIMITS: dict[torch.device, list[int]] = {}
"""The memory limits that were set, by device; torch has one limit for the whole process."""
GATHERING = {"NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "4"}
"""Environment variables for NCCL before GPUs gather: no NVLink multicast, since a driver without it ends the
process; and four thread blocks, since they occupy the GPU while they wait for the slowest member, and the host's
link needs few (docs/adr/0016)."""


def _module(device: torch.device) -> Any:
    """`torch.cuda`, `torch.xpu` or `torch.mps`."""
    return torch.get_device_module(device)


def is_available(kind: str) -> bool:
    """Whether this torch sees a device of a type: cuda, xpu or mps."""
    return bool(torch.get_device_module(kind).is_available())


def devices() -> list[torch.device]:
    """The devices with streams that this torch sees."""
    return [
        torch.device(kind, index)
        for kind in _WITH_STREAMS
        if is_available(kind)
        for index in range(torch.get_device_module(kind).device_count())
    ]


def name_of(device: torch.device) -> str:
    """The product name of a device with streams."""
    return str(_module(device).get_device_name(device))


def indexed(device: torch.device) -> torch.device:
    """`device` with its number, so that it equals those of tensors on it."""
    if device.type not in _WITH_STREAMS or device.index is not None:
        return device
    return torch.device(device.type, _module(device).current_device())


def has_streams(device: torch.device) -> bool:
    """Whether copies can run concurrently with the computation."""
    return device.type in _WITH_STREAMS


def new_stream(device: torch.device) -> Any:
    """Create a stream on `device`; None where there are none."""
    return _module(device).Stream(device) if has_streams(device) else None


def current_stream(device: torch.device) -> Any:
    """The stream of the computation; only where there are streams."""
    return _module(device).current_stream(device)


def timed_event(device: torch.device) -> Any:
    """Record an event in the computing stream of `device`, with its time."""
    event = _module(device).Event(enable_timing=True)
    event.record(current_stream(device))
    return event


def seconds_between(first: Any, last: Any) -> float:
    """The seconds from one `timed_event` to a later one; waits until the device has reached both."""
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def on_stream(stream: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, work for `device` is queued on `stream`."""
    context: AbstractContextManager[Any] = _module(device).stream(stream)
    return context


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one of this thread."""
    context: AbstractContextManager[Any] = _module(device).device(device)
    return context


def make_current(device: torch.device) -> None:
    """Make `device` the one on which this thread launches kernels."""
    if has_streams(device):
        _module(device).set_device(device)


def keep_for(tensor: torch.Tensor, stream: Any) -> None:
    """Keep the memory of `tensor` from being reused before `stream` has finished its work queued so far."""
    tensor.record_stream(stream)


def page_locked(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate a small page-locked tensor by PyTorch's own allocator."""
    return torch.empty(*shape, dtype=dtype, pin_memory=True)


def sent(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy a small host tensor to `device`, as `dtype` if given, without waiting for its arrival.

    A copy from pageable memory would wait for all work queued on the device, and for copies before it.
    """
    if not has_streams(device):
        return tensor.to(device, dtype)
    here = page_locked(*tensor.shape, dtype=dtype or tensor.dtype)
    here.copy_(tensor)
    return here.to(device, non_blocking=True)


def transit(device: torch.device, num_bytes: int) -> torch.Tensor:
    """New host memory `[num_bytes]`, uint8, for copies to or from `device`; page-locked if copies are asynchronous."""
    if has_streams(device):
        return page_locked(num_bytes, dtype=torch.uint8)
    return torch.empty(num_bytes, dtype=torch.uint8)


def can_lock_pages(device: torch.device) -> bool:
    """Whether host memory of ours can be page-locked for copies to and from `device`."""
    return device.type == "cuda"


def lock_pages(pointer: int, num_bytes: int) -> int:
    """Page-lock mapped memory; returns CUDA's error code, 0 for success."""
    return int(torch.cuda.cudart().cudaHostRegister(pointer, num_bytes, 0))


def unlock_pages(pointer: int) -> None:
    """Undo `lock_pages`."""
    torch.cuda.cudart().cudaHostUnregister(pointer)


def memory(device: torch.device) -> tuple[int, int] | None:
    """The free and the total bytes of `device`; None where its memory is the host's."""
    if device.type not in _WITH_STREAMS:
        return None
    free, total = _module(device).mem_get_info(device)
    return int(free), int(total)


def total_memory(device: torch.device) -> int:
    """The total bytes of a device with streams, as its driver reports them, without allocating any."""
    return int(_module(device).get_device_properties(device).total_memory)


def limit_memory(device: torch.device, num_bytes: int) -> Callable[[], None]:
    """Limit what torch reserves of `device` to `num_bytes`, where torch supports it; the result removes the limit.

    Of several limits of one device the lowest applies.
    """
    if device.type not in _WITH_STREAMS or not hasattr(_module(device), "set_per_process_memory_fraction"):
        return lambda: None
    held = _LIMITS.setdefault(device, [])
    held.append(num_bytes)
    _set_limit(device)

    def end() -> None:
        if num_bytes in held:
            held.remove(num_bytes)
            _set_limit(device)

    return end


def _set_limit(device: torch.device) -> None:
    total = total_memory(device)
    lowest = min(_LIMITS[device], default=total)
    _module(device).set_per_process_memory_fraction(min(1.0, lowest / total), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on any device: torch has an error type for accelerators only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _ON_CPU in str(error)
    )


def release_memory(device: torch.device) -> None:
    """Return the memory that torch reserves on `device` and does not use to the system."""
    if device.type != "cpu":
        _module(device).empty_cache()


def reset_peak(device: torch.device) -> None:
    """Reset the measurement of `peak_memory`."""
    if device.type in _WITH_STREAMS:
        _module(device).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes of `device` that torch has reserved; 0 where torch does not count them."""
    return int(_module(device).max_memory_reserved(device)) if device.type in _WITH_STREAMS else 0


class Recorder:
    """Records work for a CUDA device, to repeat it in one call (CUDA graphs); only where `has_recordings`.

    All recordings share memory: one is replayed at a time, and its results stay valid until the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = new_stream(device)  # one for all: libraries keep memory for each stream
        self._first = self.record(lambda: torch.zeros(1, device=device))  # torch forgets a pool that no graph uses

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Record `call`: the function that replays it, and where its result will be; nothing is computed yet.

        Raises what `call` raises, and `RuntimeError` for work that cannot be recorded: anything that waits for the
        device.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(current_stream(self._device))
        with on_stream(self._stream, self._device):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = call()
            except BaseException:
                with suppress(RuntimeError):  # which says that the recording is void
                    graph.capture_end()
                with suppress(RuntimeError):  # before torch 2.12 memory went on being taken for it
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                raise
            graph.capture_end()
        current_stream(self._device).wait_stream(self._stream)
        return graph.replay, result


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all queued work."""
    if device.type != "cpu":
        _module(device).synchronize(*([device] if has_streams(device) else []))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is more than an emulation (CUDA: from sm80 on)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def has_flash_attention(device: torch.device) -> bool:
    """Whether PyTorch's FlashAttention kernels run on `device` with the options that `flash` uses."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton compiles products of 16 bit numbers for `device`."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def shared_memory(device: torch.device) -> int:
    """The bytes of a CUDA device's shared memory per block; the smallest kind's elsewhere."""
    if device.type != "cuda":
        return 64 << 10
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
