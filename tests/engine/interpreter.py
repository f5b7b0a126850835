"""Runs a script in a process of its own in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def interpreted(script: str) -> list[str]:
    """Words that `script` prints; a process of its own, since Triton asks once whether to interpret."""
    pytest.importorskip("triton", reason="Triton has no build for this machine; the kernel is not used there either")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
