"""Protects: the disk tier leaves no file and no page behind, copies nothing it need not, and fails in one line."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import LATER
from safetensors.torch import load_file
from watch import cache_of

from benchmarks import disk_tier
from engine import Completion, Engine, Job
from engine.errors import CapacityError, ConfigError, EngineError
from engine.memory import arena
from engine.memory.arena import Arena
from engine.memory.disk.file import DiskFile

ROOT = Path(__file__).resolve().parents[2]
DISK = [0, 0, 0, 0, 0, 0]
WEIGHTS = [10, 20, 100, 0, 100, 0]
JOBS = [Job(prompt=[*range(10, 30 + i)], max_new_tokens=6, prompt_logprobs=True) for i in range(7)]
WRITE_ENDS = [(errno.ENOSPC, CapacityError), (errno.EIO, EngineError)]


def open_engine(directory: Path, offload: Path, **settings: Any) -> Engine:
    return Engine.from_pretrained(str(directory), policy={"device": "cpu", "offload-dir": str(offload), **settings})


def results(directory: Path, offload: Path, **settings: Any) -> list[Any]:
    with open_engine(directory, offload, **settings) as engine:
        return values(engine.run(JOBS))


def values(done: list[Completion]) -> list[Any]:
    assert [each.error for each in done] == [None] * len(done)
    return [(each.tokens, each.logprobs, each.prompt_logprobs) for each in done]


def disk_bytes(engine: Engine) -> int:
    return sum(held["disk"] for held in engine.parts.weights.placed_bytes().values())


def own_bytes(engine: Engine) -> int:
    """Bytes in files of our own."""
    return engine.parts.arena.num_bytes["disk"]


@pytest.fixture
def expected(build: Callable[[str], Path], tmp_path: Path) -> Callable[[str], list[Any]]:
    return lambda family: results(build(family), tmp_path, percent=[100, 0, 100, 0, 100, 0])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", *LATER[1:]])  # experts that are merged are copied
def test_weights_are_read_from_the_checkpoint_where_they_lie(
    family: str, build: Callable[[str], Path], tmp_path: Path, expected: Callable[[str], list[Any]]
) -> None:
    with open_engine(build(family), tmp_path, percent=WEIGHTS) as engine:
        assert values(engine.run(JOBS)) == expected(family)
        assert engine.placed_bytes()["disk"] == pytest.approx(disk_bytes(engine), abs=4096)
        assert own_bytes(engine) == 0
        assert engine.parts.weights.adopted_bytes > 0.5 * sum(map(sum, ([*h.values()] for h in held_by(engine))))


def held_by(engine: Engine) -> list[dict[Any, int]]:
    return list(engine.parts.weights.placed_bytes().values())


def to_bin(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(source / "model.safetensors"), target / "pytorch_model.bin")
    return target


@pytest.mark.parametrize("why", ["converted experts", "no safetensors", "another dtype", "encoded", "another disk"])
def test_what_cannot_stay_there_is_copied(
    why: str, build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = build("mixtral" if why == "converted experts" else "opt")
    changes: dict[str, Any] = {}
    if why == "no safetensors":
        directory = to_bin(directory, tmp_path / "bin")
    elif why == "another dtype":
        changes = {"dtype": "bfloat16"}
    elif why == "encoded":
        changes = {"compress-weight": 4}
    elif why == "another disk":
        monkeypatch.setattr(Arena, "is_on_same_disk", lambda self, path: False)
    resident = results(directory, tmp_path, percent=[100, 0, 100, 0, 100, 0], **changes)
    with open_engine(directory, tmp_path, percent=WEIGHTS, **changes) as engine:
        assert values(engine.run(JOBS)) == resident
        assert own_bytes(engine) > 0.2 * disk_bytes(engine)
        assert own_bytes(engine) + engine.parts.weights.adopted_bytes == pytest.approx(disk_bytes(engine), rel=0.01)
        assert (engine.parts.weights.adopted_bytes > 0) == (why in ("converted experts", "encoded"))


def resident_pages(handle: int, size: int) -> int:
    """Pages of a file that are in memory."""
    with mmap.mmap(handle, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as pages:
        here = (ctypes.c_char * size).from_buffer(pages)
        found = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        assert ctypes.CDLL(None).mincore(ctypes.byref(here), ctypes.c_size_t(size), found) == 0
        del here
        return sum(entry & 1 for entry in found)


def test_nothing_of_it_is_in_the_page_cache(build: Callable[[str], Path], tmp_path: Path) -> None:
    with open_engine(build("opt"), tmp_path, percent=DISK, dtype="bfloat16") as engine:
        engine.run(JOBS)
        files = engine.parts.arena._files
        if not all(file.is_direct for file in files):
            pytest.skip("this file system knows no direct access")
        sizes = {os.fstat(file._handle).st_size for file in files}
        assert len(files) > 5
        assert min(sizes) >= 4096
        assert sum(resident_pages(file._handle, os.fstat(file._handle).st_size) for file in files) == 0


def test_two_engines_share_a_directory(
    build: Callable[[str], Path], tmp_path: Path, expected: Callable[[str], list[Any]]
) -> None:
    with (
        open_engine(build("opt"), tmp_path, percent=DISK) as one,
        open_engine(build("opt"), tmp_path, percent=DISK) as two,
    ):
        streams = [engine.stream(JOBS) for engine in (one, two, one)]
        for stream in streams:
            done = sorted(stream, key=lambda pair: pair[0])
            assert [each[1].tokens for each in done] == [each[0] for each in expected("opt")]
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    def install(call: str, code: int) -> None:
        def fail(*arguments: Any) -> Any:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, fail)

    yield install
    monkeypatch.undo()


@pytest.mark.parametrize("percent", [[100, 0, 0, 0, 100, 0], [100, 0, 100, 0, 0, 0]], ids=["cache", "hidden"])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "preadv"])
@pytest.mark.parametrize(("code", "kind"), WRITE_ENDS)
def test_a_failing_disk_ends_the_run_in_one_line(
    call: str,
    code: int,
    kind: type[EngineError],
    percent: list[int],
    failing: Callable[[str, int], None],
    build: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """What was done before is delivered; whoever calls afterwards is told the same."""
    with open_engine(build("opt"), tmp_path, percent=percent, **{"gpu-batch-size": 2}) as engine:
        assert engine.run(JOBS[:1])[0].error is None
        failing(call, code)
        stream = engine.stream([Job(prompt=[*range(9, 40)] * 3, max_new_tokens=9)] * 9)
        # A full disk is no room in the cache, for the jobs that need more of it; anything else ends the engine.
        is_no_room = call == "posix_fallocate" and kind is CapacityError and percent[2] == 0
        if is_no_room:
            fault = next(done.error for _, done in stream if done.error is not None)
        else:
            with pytest.raises(EngineError) as caught:
                list(stream)
            fault = caught.value
        assert isinstance(fault, CapacityError) == (kind is CapacityError and call != "preadv")
        message = str(fault)
        assert os.strerror(code) in message
        assert str(tmp_path) in message
        assert any(letter.isdigit() for letter in message.replace(str(tmp_path), ""))
        assert "\n" not in message
        if is_no_room:
            assert engine.run(JOBS[:1])[0].error is None
        else:
            with pytest.raises(EngineError, match=os.strerror(code)):
                engine.run(JOBS[:1])
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_finds_no_room_to_grow_says_how_much_it_needs(
    failing: Callable[[str, int], None], build: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of all layers: those that were given room before the disk was full are no longer seen in what is free."""
    with open_engine(build("opt"), tmp_path, percent=[100, 0, 0, 0, 100, 0]) as engine:
        cache = cache_of(engine)
        cache.room.row_bytes["disk"] = 2 * 10**7  # as large models have them, in all layers
        failing("posix_fallocate", errno.ENOSPC)
        failed, other = engine.run([Job(prompt=[*range(9, 109)], max_new_tokens=2), Job(prompt=[5], max_new_tokens=1)])
        assert isinstance(failed.error, CapacityError)
        assert other.error is None  # it needs no room
        told = re.fullmatch(
            rf"the KV cache cannot grow to (\d+) tokens, ([\d.]+) GB on disk: offload-dir {tmp_path}: no room for .*; "
            "name another directory, or place less on disk",
            str(failed.error),
        )
        assert told is not None
        assert int(told[1]) >= 100
        assert float(told[2]) == pytest.approx(int(told[1]) * 0.02, abs=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_read_is_named_with_the_place(
    failing: Callable[[str, int], None], build: Callable[[str], Path], tmp_path: Path
) -> None:
    with open_engine(build("opt"), tmp_path, percent=WEIGHTS) as engine:
        engine.wait_until_loaded()
        failing("preadv", errno.EIO)
        with pytest.raises(EngineError, match=r"model\.safetensors: bytes \d+ to \d+ cannot be read: Input/output"):
            engine.run(JOBS)


def test_a_full_disk_is_known_when_the_engine_is_opened(
    failing: Callable[[str, int], None], build: Callable[[str], Path], tmp_path: Path
) -> None:
    failing("posix_fallocate", errno.ENOSPC)
    with pytest.raises(CapacityError, match="No space left on device"):
        open_engine(build("opt"), tmp_path, percent=WEIGHTS, dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_on_a_read_only_disk_is_named_in_one_line(
    build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(name: str, flags: int, *more: int, **named: Any) -> int:
        if str(name).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    for percent in (WEIGHTS, [100, 0, 50, 0, 100, 0], [100, 0, 100, 0, 50, 0]):
        with pytest.raises(ConfigError, match="is not writable: Read-only file system; name another") as caught:
            open_engine(build("opt"), tmp_path, percent=percent)
        assert str(tmp_path) in str(caught.value)


def test_a_network_file_system_is_used_with_a_warning(
    build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "network_file_system", lambda directory: "nfs4")
    with pytest.warns(UserWarning, match=f"offload-dir {tmp_path} is on a network file system") as caught:
        assert results(build("opt"), tmp_path, percent=DISK)
    assert len(caught) == 1
    assert results(build("opt"), tmp_path, percent=[50, 50, 50, 50, 50, 50])  # nothing is there: no warning


CHILD = """
import signal, sys
from engine import Engine, Job
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
directory, offload = sys.argv[1:]
policy = {"device": "cpu", "offload-dir": offload, "percent": [0, 0, 0, 0, 0, 0], "dtype": "bfloat16"}
with Engine.from_pretrained(directory, policy=policy) as engine:
    jobs = [Job(prompt=list(range(5, 25)), max_new_tokens=40) for _ in range(4)]
    for round in range(10**6):
        engine.run(jobs)
        print("ready", flush=True)
"""


@pytest.mark.usefixtures("warm_processes")
def test_no_file_stays_however_a_process_ends(build: Callable[[str], Path], tmp_path: Path) -> None:
    children: dict[signal.Signals, subprocess.Popen[str]] = {}
    try:
        for end in (signal.SIGKILL, signal.SIGINT):
            command = [sys.executable, "-c", CHILD, str(build("opt")), str(tmp_path)]
            children[end] = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        for end, child in children.items():
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            handles = [os.readlink(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir()]
            assert len([name for name in handles if name.startswith(f"{tmp_path}/")]) > 5
            assert list(tmp_path.iterdir()) == []
            child.send_signal(end)
            child.wait(30)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_keys_and_values_on_disk_are_read_once_for_all_who_share_them(
    build: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = [*range(40, 80)]
    jobs = [Job(prompt=[*prefix, 5 + i], max_new_tokens=3) for i in range(12)]
    percent = [100, 0, 0, 0, 100, 0]
    with open_engine(build("opt"), tmp_path, percent=percent, **{"gpu-batch-size": 2}) as engine:
        runs: list[tuple[int, int]] = []
        disk = cache_of(engine)._disk
        fetch = disk.fetch

        def note(table: int, wanted: list[tuple[int, int]]) -> Any:
            runs.extend((table, first) for first, rows in wanted if rows == len(prefix))
            return fetch(table, wanted)

        monkeypatch.setattr(disk, "fetch", note)
        before = engine.num_sweeps
        engine.run(jobs)
        sweeps = engine.num_sweeps - before
        layers = len(engine.parts.model.layers)
        assert layers <= len(runs) <= (sweeps - 1) * layers


def test_a_sweep_reads_no_keys_that_are_still_being_written(
    build: Callable[[str], Path], tmp_path: Path, expected: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's writes end only when somebody waits for them (or after a second)."""
    with open_engine(build("opt"), tmp_path, percent=[100, 0, 0, 0, 100, 0]) as engine:
        disk, awaited = cache_of(engine)._disk, threading.Event()
        settle, write = disk.settle, engine.parts.arena.io.write

        def waiting() -> None:
            awaited.set()
            settle()
            awaited.clear()

        def late(file: DiskFile, *arguments: Any) -> None:
            if file is disk._files[-1]:
                awaited.wait(1)
            write(file, *arguments)

        monkeypatch.setattr(disk, "settle", waiting)
        monkeypatch.setattr(engine.parts.arena.io, "write", late)
        for found, (tokens, logprobs, _) in zip(engine.run(JOBS), expected("opt"), strict=True):
            assert found.tokens == tokens
            assert found.logprobs == pytest.approx(logprobs, abs=1e-5, rel=0)


def test_the_record_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tmp_path / "tiny.json"
    config = {"model_type": "opt", "dtype": "float32", "hidden_size": 256, "ffn_dim": 512, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "word_embed_proj_dim": 256, "vocab_size": 512, "max_position_embeddings": 64}
    shape.write_text(json.dumps(config))
    arguments = ["--shape", str(shape), "--weights", "0", "50", "--jobs", "3", "--prompt", "8", "4", "--runs", "2"]
    arguments += ["--offload-dir", str(tmp_path / "offload"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["disk_tier", *arguments, "--out", str(tmp_path)])
    disk_tier.main()
    none, half = json.loads((tmp_path / "disk-tier-tiny.json").read_text())["rows"]
    assert none["disk_bytes_a_sweep"] == 0
    parameters = 512 * 256 + 3 * (4 * (256 * 256 + 256) + 2 * 256 * 512 + 512 + 256 + 4 * 256)
    assert half["disk_bytes_a_sweep"] == pytest.approx(4 * parameters / 2, rel=0.01)
    assert half["sweeps"] == [1, 1]
    assert half["plain_reader_bytes"] == pytest.approx(half["disk_bytes_a_sweep"], rel=0.05)  # whole blocks
    assert half["limit_s"][0] == pytest.approx(sum(half["plain_reader_s"][:2]) / 2)
    assert half["over_limit"][1] == pytest.approx(half["seconds"][1] / half["limit_s"][1])
    assert not list((tmp_path / "offload").iterdir())
