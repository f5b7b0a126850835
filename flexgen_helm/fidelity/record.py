"""The file in a run's directory that says how near the run is to the reference."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "fidelity.json"


def write_record(run_path: Path, record: Mapping[str, Any]) -> None:
    """Write `fidelity.json` into a run's directory; it is never half written."""
    scratch = run_path / f".{FILE_NAME}.{os.getpid()}"
    try:
        scratch.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        scratch.replace(run_path / FILE_NAME)
    finally:
        scratch.unlink(missing_ok=True)
