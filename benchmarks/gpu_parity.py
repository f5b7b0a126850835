"""Runs the GPU parity tests and records what they measured: `python -m benchmarks.gpu_parity [--out DIR]`."""

from __future__ import annotations

import argparse
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run tests/gpu; records the largest log-probability difference of each test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "junit.xml"
        code = pytest.main([str(ROOT / "tests" / "gpu"), f"--junitxml={log}", "-q", "-W", "default"])
        cases = list(ET.parse(log).iter("testcase"))
    tests: list[dict[str, Any]] = []
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        outcome = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        entry: dict[str, Any] = {"test": case.get("name"), "outcome": outcome}
        entry |= {item.get("name", ""): float(item.get("value", "nan")) for item in case.iter("property")}
        if bad is not None:
            entry["message"] = (bad.get("message") or "")[:300]
        tests.append(entry)
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "failed", "skipped")}
    path = write_record("gpu-parity", {"counts": counts, "tests": tests}, options.out)
    print(counts, path)
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
