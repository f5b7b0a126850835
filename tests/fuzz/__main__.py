"""`make fuzz`: feeds generated content to every fuzz target (`Door`), and prints one line of results for each.

Each target runs in a process of its own, which is killed if a case takes too long, and restarted after that case. If
`atheris` is installed, it guides the generation by code coverage; otherwise cases are random. The exit code is 1 if any
case was neither accepted nor refused in one line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from door import ACCEPTED, LIMIT_S, REFUSED, STARTS_S, Tally
from doors import DOORS

HERE = Path(__file__).resolve().parent
MEMORY = Path("/dev/shm")
SILENT_S = 6 * LIMIT_S
"""Seconds after which a process is killed whose case does not react to signals."""


def main() -> int:
    """Parse the command line and run the fuzz targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="at each door (1000)")
    parser.add_argument("--doors", nargs="*", metavar="NAME", help="those whose names begin so (all)")
    parser.add_argument("--seed", type=int, default=0, help="of what is made at random (0)")
    parser.add_argument("--jobs", type=int, default=2, help="doors at a time (2)")
    parser.add_argument("--finds", type=Path, help="file to write the finds to, with a case of each")
    args = parser.parse_args()
    begins = tuple(args.doors or [""])
    names = [door.name for door in DOORS if door.name.startswith(begins)]
    print(f"{'door':<32} {'cases':>8} {ACCEPTED:>9} {REFUSED:>20} {'else':>6} {'seconds':>8}", flush=True)
    finds: dict[str, Any] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, (tally, seconds) in zip(names, pool.map(lambda name: _fuzz(name, args), names), strict=True):
            accepted, refused = tally.outcomes[ACCEPTED], tally.outcomes[REFUSED]
            others = tally.num_cases - accepted - refused
            print(
                f"{name:<32} {tally.num_cases:>8} {accepted:>9} {refused:>20} {others:>6} {seconds:>8.0f}", flush=True
            )
            finds |= {f"{name}: {kind}": vars(find) for kind, find in tally.finds.items()}
            if args.finds:
                args.finds.write_text(json.dumps(finds, indent=1))
    for kind, find in finds.items():
        print(f"\n{kind}, {find['count']} cases, of them {find['case'][:2000]}\n{find['told']}")
    return 1 if finds else 0


def _fuzz(name: str, args: argparse.Namespace) -> tuple[Tally, float]:
    """Run a target's cases; returns their tally and the seconds that they took."""
    tally, begin, seed = Tally(), time.monotonic(), args.seed
    while tally.num_cases < args.cases:
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
            seed += 1000
            state, before = Path(folder), tally.num_cases
            _run_until_it_ends(name, args.cases - tally.num_cases, seed, state)
            _add(tally, state, name)
            if tally.num_cases == before:
                raise SystemExit(
                    f"{name}: the process for it ends without a case: {(state / 'output').read_text()[-2000:]}"
                )
    return tally, time.monotonic() - begin


def _run_until_it_ends(name: str, cases: int, seed: int, state: Path) -> None:
    """Run the process of a target; kill it if it begins no new case for too long."""
    command = [sys.executable, str(HERE / "inside.py"), name, str(cases), str(seed), str(state)]
    (state / "scratch").mkdir()
    with (
        (state / "output").open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process,
    ):
        begun = time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            current = state / "current"
            last = current.stat().st_mtime if current.exists() else None
            waits = time.time() - last if last else time.monotonic() - begun
            if waits > (SILENT_S if (state / "told").exists() else STARTS_S):
                process.kill()


def _add(tally: Tally, state: Path, name: str) -> None:
    """Add the results that a process has recorded; the case during which it ended is a finding."""
    told = state / "told"
    if told.exists():
        found = json.loads(told.read_text())
        tally.outcomes.update(found["outcomes"])
        for kind, find in found["finds"].items():
            tally.note(kind, find["told"], find["case"], find["count"])
        if found["is_whole"]:
            return
    current = state / "current"
    if current.exists():
        tally.note(
            f"the process of {name} ends, or hangs",
            (state / "output").read_text(errors="replace")[-3000:],
            current.read_text(),
        )


if __name__ == "__main__":
    sys.exit(main())
