"""Records of measurements: JSON files that name the commit and the hardware they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


def write_record(name: str, content: dict[str, Any], directory: Path) -> Path:
    """Write `<directory>/<name>.json`, with commit and hardware in front, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    text = json.dumps({"commit": commit(), "hardware": hardware(), **content}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """The checkout's commit, marked when files differ from it; or what BENCHMARK_COMMIT says (a copy without git)."""
    if "BENCHMARK_COMMIT" in os.environ:
        return os.environ["BENCHMARK_COMMIT"]
    if not (_ROOT / ".git").exists():
        return "unknown"
    head, changed = (
        subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    return (head or "unknown") + ("-modified" if changed else "")


def hardware() -> dict[str, Any]:
    """Processor, memory, accelerators and the versions that matter."""
    import torch
    import transformers

    from engine.memory import accelerator
    from engine.planning.machine import processor_name

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "host_memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "accelerators": [accelerator.name_of(device) for device in accelerator.devices()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
