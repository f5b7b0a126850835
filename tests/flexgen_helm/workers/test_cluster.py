"""Protects: a model on workers of a Ray cluster: who is asked for, what is refused, and what follows a loss."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray_processes import MARK, workers_of

from engine.errors import ConfigError, EngineError
from flexgen_helm.commands.complete import complete
from flexgen_helm.workers.cluster import connection, ray_supply
from flexgen_helm.workers.cluster.ray_host import how_ended
from flexgen_helm.workers.cluster.slots import Node, Slot, Wanted, num_fitting, slots_of

ROOT = Path(__file__).resolve().parents[3]
EIGHT, FOUR, HEAD = (Node(id=name, name=name, gpus=gpus, cpus=32) for name, gpus in (("a", 8), ("b", 4), ("head", 0)))


def on(node: str, gpus: int, cpus: int) -> Slot:
    return Slot(gpus=gpus, cpus=cpus, node=node)


@pytest.mark.parametrize(
    ("wanted", "nodes", "slots"),
    [
        (Wanted(), [EIGHT, FOUR, HEAD], [on("a", 8, 32), on("b", 4, 32)]),
        (Wanted(), [HEAD], [on("head", 0, 32)]),
        (Wanted(gpus_per_worker=4), [EIGHT, FOUR], [*[on("a", 4, 16)] * 2, on("b", 4, 32)]),
        (Wanted(gpus_per_worker=3), [EIGHT, FOUR], [*[on("a", 3, 12)] * 2, on("b", 3, 24)]),
        (Wanted(gpus_per_worker=0), [FOUR], [on("b", 0, 32)]),
        (Wanted(workers=3), [EIGHT, FOUR], [Slot(gpus=4, cpus=16)] * 3),
        (Wanted(workers=12), [EIGHT, FOUR], [Slot(gpus=1, cpus=4)] * 12),
        (Wanted(workers=20), [EIGHT, FOUR], [Slot(gpus=1, cpus=4)] * 20),  # 8 of them wait
        (Wanted(workers=2, gpus_per_worker=8), [EIGHT, FOUR], [Slot(gpus=8, cpus=32)] * 2),
        (Wanted(workers=4), [HEAD], [Slot(gpus=0, cpus=8)] * 4),
        (Wanted(workers=1, gpus_per_worker=1), [], [Slot(gpus=1, cpus=1)]),  # a cluster that grows when it is asked
        (Wanted(), [], []),
    ],
)  # fmt: skip
def test_workers_are_all_there_is_or_as_many_as_are_wanted(
    wanted: Wanted, nodes: list[Node], slots: list[Slot]
) -> None:
    assert slots_of(wanted, nodes) == slots


def test_what_has_room_is_counted_machine_by_machine() -> None:
    assert num_fitting([Slot(gpus=4, cpus=16)] * 4, [EIGHT, FOUR], {}) == 3
    assert num_fitting([Slot(gpus=4, cpus=16)] * 4, [EIGHT, FOUR], {"a": (7, 32), "b": (4, 8)}) == 1
    assert num_fitting([Slot(gpus=1, cpus=1, node="a")] * 9, [EIGHT, FOUR], {}) == 8


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://head:10001", "--ray auto"),
        ("head", "give host:port"),
        ("127.0.0.1:99999", "nothing answers"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        connection.check_address(address)


def test_a_port_that_nobody_listens_at_is_named_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--ray {address}: nothing answers there"):
            connection.check_address(address)


@pytest.mark.parametrize(("error", "tries"), [("The current node timed out during startup. It", 2), ("no room", 1)])
def test_a_cluster_that_is_slow_to_start_is_started_again(error: str, tries: int) -> None:
    class Ray:
        tries = 0

        def init(self, **how: Any) -> None:
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError(error)

    ray = Ray()
    told = pytest.raises(EngineError, match=f"cannot be started on this machine: {error}")
    with nullcontext() if tries > 1 else told:
        connection._start(ray, 1)
    assert ray.tries == tries


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workers", "2"], "--workers is for --ray"),
        (["--no-wait"], "--no-wait is for --ray"),
        (["--gpus-per-worker", "0"], "--gpus-per-worker is for --ray"),
        (["--ray", "--workers", "0"], "--workers 0 is below 1"),
        (["--ray", "--gpus-per-worker", "-1"], "--gpus-per-worker -1 is negative"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anything_is_reached_for(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        complete(["--model", "none", "a prompt", *flags])


class MadeRay:
    """What the supply asks Ray for: actors that never say anything, on machines of which the head may not tell."""

    def __init__(self) -> None:
        self.started = self.killed = 0
        self.is_away = threading.Event()
        self.asked = threading.Event()

    def remote(self, **options: Any) -> Any:
        return lambda made: self

    def options(self, **options: Any) -> Any:
        self.started += 1
        return SimpleNamespace(remote=lambda make: SimpleNamespace(hello=SimpleNamespace(remote=object)))

    def nodes(self) -> list[dict[str, Any]]:
        while self.is_away.is_set():
            self.asked.set()
            time.sleep(0.01)
        each = {"NodeManagerHostname": "a", "Alive": True, "Resources": {"CPU": 1.0}}
        return [{**each, "NodeID": name} for name in ("one", "two")[: 1 + self.asked.is_set()]]

    def wait(self, references: list[Any], **how: Any) -> tuple[list[Any], list[Any]]:
        time.sleep(0.01)
        return (references[:1] if self.asked.is_set() else []), []

    def get(self, reference: Any) -> Any:
        raise OSError("it is dead because nobody wants it")

    def kill(self, actor: Any) -> None:
        self.killed += 1


def test_workers_are_heard_while_the_cluster_does_not_tell_its_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_supply, "_NODES_S", 0.01)
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    ray, failed = MadeRay(), threading.Event()
    supply = ray_supply.RaySupply(ray, Wanted(), {}, lambda opening: None)  # type: ignore[arg-type,return-value]
    supply.begin(lambda host: None, lambda error: failed.set())
    assert ray.started == 1
    ray.is_away.set()
    assert failed.wait(20.0), "that the worker has ended three times is heard"
    assert ray.started == 3
    supply.close()
    ray.is_away.clear()
    time.sleep(0.1)
    assert ray.started == 3, "a machine that is told of when all is over gets no worker"


def test_of_rays_many_lines_the_one_that_says_it_is_told() -> None:
    lines = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 5\nThe actor is dead because "
        "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: End of file. Some common "
        "causes include: (1) the moon"
    )
    said = "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: End of file."
    assert how_ended(Exception(lines)) == said
    assert how_ended(Exception("")) == "Exception"


def test_ray_is_not_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys, flexgen_helm.commands.sweep, flexgen_helm.commands.complete, flexgen_helm.commands.lm_eval\n"
        "import flexgen_helm.workers.cluster.flags, engine.hosts.hosts_engine, engine.hosts.serving\n"
        "flexgen_helm.commands.complete.complete_parser().parse_args(['--model', 'm', 'p'])\n"
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def told_by(program: str) -> dict[str, Any]:
    """What a program beside these tests has found; none of its workers outlives it."""
    mark = uuid.uuid4().hex
    paths = [ROOT, ROOT / "benchmarks", ROOT / "tests/flexgen_helm"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), MARK: mark}
    command = [sys.executable, str(ROOT / "tests/flexgen_helm" / program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert workers_of(mark) == [], "no worker outlives its driver"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_machine_that_is_drained_is_left_without_a_loss() -> None:
    found = told_by("ray_drained.py")
    assert found == {"machines": 2, "accepted": True, "is_right": True, "left": 1, "deaths": [], "given_up": {}}


@pytest.fixture(scope="module")
def session() -> dict[str, Any]:
    """What `ray_session` has found."""
    return told_by("ray_session.py")


def test_a_worker_that_is_killed_is_replaced_and_every_answer_is_right(session: dict[str, Any]) -> None:
    assert session["is_right"]
    assert len(session["deaths"]) == 1
    assert session["given_up"] == {}
    name = socket.gethostname()
    assert session["deaths"][0].startswith((f"{name}: ", f"{name}-2: "))


def test_a_worker_of_another_version_is_refused_by_name(session: dict[str, Any]) -> None:
    assert f"{socket.gethostname()}: it has flexgen-helm " in session["refused"]
    assert "(the driver has 0.0): install the same on all machines" in session["refused"]


def test_what_has_no_room_is_told_with_what_there_is(session: dict[str, Any]) -> None:
    assert session["no_room"].startswith("no room for 500 workers of 1 CPU each, but for ")
    assert "GPUs and" in session["no_room"]
