"""Sweeps that are killed at random moments and given again: `python killed_sweeps.py DATA MODEL FOLDER NUMBER SEED`.

A program of its own: every sweep is a fork of it, which spares importing HELM and torch anew. Prints, as JSON, what
each kill left and what the second sweep made of it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from in_this_process import load_in_this_process

SWEEP_S = 0.04
"""What each pass over the layers takes at least, so that a kill finds one under way."""
ENTRIES = [
    *(f"mmlu:subject={subject}" for subject in ("anatomy", "abstract_algebra", "us_foreign_policy")),
    "synthetic_reasoning_natural:difficulty=easy",
]


def sweep(folder: Path, data: Path, model: Path, more: list[str]) -> int:
    """Begin a sweep in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        (folder / "benchmark_output").mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        scenarios = Path("benchmark_output/scenarios")
        if not scenarios.exists():
            scenarios.symlink_to(data / "scenarios")
        out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        watch_deliveries()
        from flexgen_helm.run import main

        code = main(
            ["sweep", "-r", *ENTRIES, "-m", "4", "--model", str(model), "--suite", "s", "--gpu-batch-size", "4",
             "--num-gpu-batches", "1", *more]
        )  # fmt: skip
        Path("modules").write_text("\n".join(sys.modules))
    finally:
        os._exit(code)


def watch_deliveries() -> None:
    """Make sweeps slow, and write down how many answers each has delivered, at once."""
    from engine.executor import Executor
    from engine.sweep_loop import SweepLoop

    log = os.open("delivered", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    pass_over, deliver = Executor.sweep, SweepLoop._deliver

    def slowly(self: Any, *args: Any) -> Any:
        time.sleep(SWEEP_S)
        return pass_over(self, *args)

    def noted(self: Any, done: Any) -> None:
        done = list(done)
        deliver(self, done)
        if done:
            os.write(log, f"{len(done)}\n".encode())

    Executor.sweep = slowly  # type: ignore[method-assign]
    SweepLoop._deliver = noted  # type: ignore[method-assign]


def killed(child: int, after_s: float) -> int:
    """Kill a sweep after so many seconds, if it still runs."""
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return child


def ended(child: int) -> int:
    """Exit code of a sweep, when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kept(folder: Path) -> int:
    """Answers in HELM's cache."""
    file = folder / "prod_env/cache/flexgen.sqlite"
    if not file.exists():
        return 0
    with sqlite3.connect(file) as connection:  # rolls back what was being written
        tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'unnamed'").fetchone()[0]
        return int(connection.execute("SELECT count(*) FROM unnamed").fetchone()[0]) if tables else 0


def main() -> None:
    """Kill and repeat."""
    import torch

    import flexgen_helm.sweeps.runner  # noqa: F401 - imported before the first fork
    from flexgen_helm.helm.engines import engines
    from flexgen_helm.planning.auto_policy import resources_here
    from flexgen_helm.runs import launch
    from flexgen_helm.workers.engine_processes import engine_processes

    engines.load, engine_processes.prepare = load_in_this_process, lambda: None  # type: ignore[method-assign]
    engine_processes.resources = engine_processes.last_resources = resources_here  # type: ignore[method-assign]

    torch.set_num_threads(1)
    launch.register_builtin_configs_from_helm_package()  # longer than a sweep of ours; once is enough
    launch.register_builtin_configs_from_helm_package = lambda: None
    data, model, folder = (Path(argument) for argument in sys.argv[1:4])
    number, dice = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    assert ended(sweep(folder / "undisturbed", data, model, [])) == 0
    for name in (folder / "undisturbed/modules").read_text().split():
        with suppress(Exception):  # what a sweep imports on its way need not be imported by each of them
            importlib.import_module(name)
    begun = time.monotonic()
    assert ended(sweep(folder / "timed", data, model, [])) == 0
    whole_s = time.monotonic() - begun
    found = []
    for kill in range(number):
        place = folder / f"killed{kill}"
        after_s = dice.uniform(0.1, 0.95) * whole_s
        while (code := ended(killed(sweep(place, data, model, []), after_s))) == 0:  # it was faster than the timed one
            shutil.rmtree(place)
            after_s *= 0.7
        log = place / "delivered"
        delivered = [int(line) for line in log.read_text().split()] if log.exists() else []
        answers = kept(place)
        again = ended(sweep(place, data, model, ["--skip-completed-runs"] if kill % 2 else []))
        asked_again = sum(int(line) for line in log.read_text().split())
        found.append(
            {
                "after_s": after_s,
                "of_s": whole_s,
                "code": code,
                "delivered": delivered,
                "kept": answers,
                "second_code": again,
                "second_delivered": asked_again,
                "kept_in_the_end": kept(place),
            }
        )
    print(json.dumps({"total": kept(folder / "undisturbed"), "kills": found}))


if __name__ == "__main__":
    main()
