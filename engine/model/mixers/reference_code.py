"""Replaces kernels of installed packages by transformers' own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import hub_kernels

_ASKED = "is_torchdynamo_exporting"


@contextmanager
def reference_code() -> Iterator[None]:
    """Inside, families compute by transformers' own functions: kernels run neither without numbers nor on the CPU.

    transformers does the same during an export, which this pretends. It applies to other threads, too.
    """
    before = getattr(hub_kernels, _ASKED, None)
    if before is None:
        yield
        return
    setattr(hub_kernels, _ASKED, lambda: True)
    try:
        yield
    finally:
        setattr(hub_kernels, _ASKED, before)
