"""A process of a benchmark that is controlled by lines of text."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_ENDS_AFTER_S = 60


class Process:
    """An engine on one device, controlled by lines of text: JSON in both directions."""

    def __init__(self, module: str, arguments: Sequence[str], handles: Sequence[int] = ()) -> None:
        """module: the benchmark that serves, with `--serve` and `arguments`; handles: open files that it gets, too."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=handles,
            text=True,
            cwd=ROOT,
        )

    def tell(self, message: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def hear(self) -> Any:
        """Return the next answer; raises `RuntimeError` if the process has ended or failed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError(f"a process ended with exit code {self._process.wait()}")

    def end(self) -> None:
        """Let the process end; kill it if it does not."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        with contextlib.suppress(OSError), self._process:  # closes the pipes
            with contextlib.suppress(OSError):
                self.tell(None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_AFTER_S)
            self._process.kill()
