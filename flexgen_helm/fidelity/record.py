"""The file in a run's directory with the run's comparison with the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.memory.replaced import replace_text

FILE_NAME = "fidelity.json"


def write_record(run_path: Path, record: Mapping[str, Any]) -> None:
    """Write `fidelity.json` into a run's directory, atomically."""
    replace_text(run_path / FILE_NAME, json.dumps(record, indent=2) + "\n")
