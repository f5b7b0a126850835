"""On a CUDA device, sampling a full chunk of logits takes the memory that plans set aside for it."""

from __future__ import annotations

import pytest
import torch

from engine.job import Sampling
from engine.planning.limits import LOGITS_BYTES
from engine.sampling import choose

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocabulary", [50272, 128256])
def test_sampling_takes_less_than_another_chunk(vocabulary: int) -> None:
    rows = LOGITS_BYTES // (4 * vocabulary)
    logits = torch.randn(rows, vocabulary, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    choose(logits, [Sampling(temperature=1.0)] * rows, [0.5] * rows, [[]] * rows)
    assert torch.cuda.max_memory_allocated() - before <= LOGITS_BYTES
