"""Protects: what the cluster examples start, stop and start again is what users are told."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from engine.policy import Policy
from flexgen_helm.commands.sweep import sweep_parser
from flexgen_helm.runs.flags import parse_run_flags

CLUSTER = Path(__file__).resolve().parent.parent / "examples" / "cluster"

STAND_INS = {
    "scontrol": """if [ "$1" = show ]; then echo "node1"; echo "node2"; else echo "$@" >>"$LOGS/scontrol"; fi""",
    "srun": """while [[ $1 == --* ]]; do shift; done; "$@"; exit 137""",  # as where another node was killed
    "ray": """echo "$@" >"$LOGS/ray"; while [ "$1" != -- ]; do shift; done; shift; "$@" """,
    "flexgen-helm": """
echo "$@" >"$LOGS/driver"
trap 'exit 75' USR1
touch "$LOGS/begun"
for _ in $(seq "$TENTHS"); do sleep 0.1; done
exit "$CODE" """,
}


def start(tmp_path: Path, *, code: int, tenths: int) -> subprocess.Popen[bytes]:
    """The batch script on the first of two nodes; its command ends with `code` after so many tenths of a second."""
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
    ours = {"LOGS": str(tmp_path), "CODE": str(code), "TENTHS": str(tenths), "SLURM_SUBMIT_DIR": str(tmp_path)}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(["bash", CLUSTER / "sweep.sbatch"], env={**os.environ, **slurm, **ours, "PATH": path})


def requeued(tmp_path: Path) -> str:
    told = tmp_path / "scontrol"
    return told.read_text() if told.exists() else ""


@pytest.mark.parametrize("code", [0, 1, 75, 143])
def test_a_batch_job_ends_as_its_command_does_and_comes_again_where_that_is_not_finished(
    tmp_path: Path, code: int
) -> None:
    job = start(tmp_path, code=code, tenths=0)
    assert job.wait(60) == code
    assert requeued(tmp_path) == ("requeue 7\n" if code == 75 else "")
    assert (tmp_path / "ray").read_text().startswith("symmetric-run --address node1:6379 --min-nodes 2 ")
    assert not list(tmp_path.glob(".helm-sweep-*"))


def test_the_warning_of_the_walltime_reaches_the_command_and_the_job_comes_again(tmp_path: Path) -> None:
    job = start(tmp_path, code=0, tenths=600)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@300` does
        assert job.wait(60) == 75
    finally:
        job.kill()
    assert requeued(tmp_path) == "requeue 7\n"


def test_the_batch_script_asks_for_what_it_relies_on() -> None:
    lines = (CLUSTER / "sweep.sbatch").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ").partition("=")[0] for line in lines if line.startswith("#SBATCH ")}
    assert asked >= {"--requeue", "--exclusive", "--signal", "--ntasks-per-node", "--open-mode"}


def commands() -> list[list[str]]:
    """The command lines of our program in both files."""
    batch = next(line for line in (CLUSTER / "sweep.sbatch").read_text().splitlines() if line.startswith("command=("))
    entry = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]["entrypoint"]
    _, _, ours = shlex.split(entry)[-1].partition(" exec ")
    return [shlex.split(batch.removeprefix("command=(").removesuffix(")")), shlex.split(ours)]


def parsed(command: list[str]) -> argparse.Namespace:
    program, name, *arguments = command
    assert (program, name) == ("flexgen-helm", "sweep")
    return parse_run_flags(arguments, sweep_parser())


def test_a_rays_job_runs_what_the_batch_script_runs_and_takes_its_cluster_down() -> None:
    of_batch, of_job = (parsed(words) for words in commands())
    assert {**vars(of_batch), "model": None} == {**vars(of_job), "model": None, "policy": of_batch.policy}
    assert of_batch.ray == "auto"
    assert Policy.load(CLUSTER / of_job.policy).dtype == "bfloat16"  # a head without GPUs would take float32
    spec = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0  # else nobody goes on where it was
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len({pod["template"]["spec"]["containers"][0]["image"] for pod in pods}) == 1
