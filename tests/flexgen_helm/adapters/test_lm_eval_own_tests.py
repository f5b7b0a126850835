"""Protects: lm-evaluation-harness's own tests of its `hf` model hold for our adapter.

LM_EVAL_CHECKOUT names a checkout of the harness (its packages have no tests); the plugin that they run under says what
stands in for models and data of the hub, and which tests do not apply.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install -e '.[lm-eval]'")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif("LM_EVAL_CHECKOUT" not in os.environ, reason="LM_EVAL_CHECKOUT names no checkout of the harness")
def test_the_harness_own_tests_of_its_model(tmp_path: Path) -> None:
    models = Path(os.environ["LM_EVAL_CHECKOUT"]).resolve() / "tests" / "models"
    files = [str(models / f"{name}.py") for name in ("test_huggingface", "test_bos_handling")]
    paths = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("flexgen_helm", "engine"))]
    settings = {"HARNESS_STAND_INS": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "harness_stand_ins", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed, (\d+) skipped", done.stdout)
    assert found is not None, done.stdout[-2000:]
    assert int(found[1]) >= 25  # of two files, without those that do not apply
