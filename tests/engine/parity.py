"""The policies under which families are compared with plain `transformers`, and what is known of the jobs."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen_helm.checking.jobs import (
    INNER,
    JOBS,
    OUTER,
    REACH,
    TOLERANCE,
    Expected,
    contradictions,
    differences,
    expect,
    reach,
)

__all__ = [
    "INNER",
    "JOBS",
    "LATER",
    "OUTER",
    "REACH",
    "TOLERANCE",
    "Expected",
    "contradictions",
    "differences",
    "expect",
    "reach",
]

LATER = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("qwen3-next", "lfm2", "falcon-h1", "llama4", "gemma4-multimodal")
]
"""A recurrent state, a convolution's, one beside keys and values, attention in chunks, text of a multimodal model."""
POLICIES: dict[str, dict[str, Any]] = {
    "device": {"percent": [100, 0, 100, 0, 100, 0]},
    "20-80": {"percent": [20, 80, 0, 100, 0, 100]},
    "host": {"percent": [0, 100, 0, 100, 0, 100]},
    "disk": {"percent": [0, 0, 0, 0, 0, 0]},
    "thirds": {"percent": [34, 33, 34, 33, 34, 33]},
    "small": {"percent": [50, 50, 50, 50, 50, 50], "gpu-batch-size": 2, "num-gpu-batches": 2},
}
PADDINGS = {"packed": None, "bucket": "bucket", "fixed": 80}
SELECTION = (("device", "packed"), ("thirds", "packed"), ("small", "bucket"))
"""Policies and paddings that meet all a family's code can notice: parameters bound once or passing through slots, keys
and values on every tier, company of several kinds, several sweeps, padding."""
WIDE = 29
"""Tokens that two of the lone prompts share."""
SAVED = 7 * OUTER + 3 * INNER + WIDE
"""Prompt tokens that need no computing: all users but the first of each prefix."""
UNFED = sum(1 for job in JOBS if job.max_new_tokens == 0 and len(job.prompt) > 1)
"""Last tokens that nothing is asked behind."""
