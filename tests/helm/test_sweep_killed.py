"""Protects: a sweep that is killed at any moment goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweeping import differences

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_sweeps_lose_no_request(number: int, tiny_llama: Path, helm_data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, Path(__file__).with_name("killed_sweeps.py"), helm_data, tiny_llama, tmp_path]
    done = subprocess.run(
        [*map(str, program), str(number), str(number)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["kills"]) == number
    for index, kill in enumerate(found["kills"]):
        assert kill["code"] == -9, kill
        lost = sum(kill["delivered"]) - kill["kept"]
        assert lost <= sum(sorted(kill["delivered"])[-1:]), kill  # at most the answers of one sweep
        assert kill["second_code"] == 0, (tmp_path / f"killed{index}" / "out").read_text()[-3000:]
        assert kill["second_delivered"] == found["total"] - kill["kept"], kill  # nothing that was kept is asked again
        assert kill["kept_in_the_end"] == found["total"]
        suites = (tmp_path / name / "benchmark_output/runs/s" for name in (f"killed{index}", "undisturbed"))
        assert differences(*suites) == [], kill
