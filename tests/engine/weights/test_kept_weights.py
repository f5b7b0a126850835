"""Protects: encoded weights that were kept are what the checkpoint would give, or they are not used."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from codes import join
from parity import JOBS, POLICIES
from safetensors import safe_open

from engine import Engine, EngineError, Job
from engine.kernels.codec import Codec
from engine.weights.encoded import kept as kept_weights
from engine.weights.encoded import unit_file
from engine.weights.encoded.kept import KeptWeights
from engine.weights.store import WeightStore

Notices = Callable[[], list[str]]
JOB = Job(prompt=[*range(10, 40)], max_new_tokens=3, prompt_logprobs=True)
UNITS = ["embedding", "head", "layer.0", "layer.1", "layer.2", "outer"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexgen-helm" / "weights"


@pytest.fixture
def model(build: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of its own."""
    return Path(shutil.copytree(build("llama"), tmp_path / "model"))


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Notices:
    """What was told since the last call."""

    def take() -> list[str]:
        told = [record.getMessage() for record in caplog.records if record.name.startswith("engine")]
        caplog.clear()
        assert all("\n" not in text for text in told)
        return told

    return take


@pytest.fixture
def only_kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, nothing can come from the checkpoint."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a parameter came from the checkpoint")

    return lambda: monkeypatch.setattr(WeightStore, "put", refuse)


def answers(model: Path, tmp_path: Path, bits: int = 4, policy: str = "device", jobs: Any = (JOB,)) -> list[Any]:
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path / "off"), "compress-weight": bits}
    with Engine.from_pretrained(str(model), policy=settings) as engine:
        done = engine.run(jobs)
        engine.wait_until_loaded()
    assert all(each.error is None for each in done)
    return [(each.tokens, each.logprobs, each.prompt_logprobs) for each in done]


def files(cache: Path) -> dict[str, bytes]:
    """By path in the cache; what is being written has a name with a dot in front."""
    return {str(each.relative_to(cache)): each.read_bytes() for each in cache.rglob("*") if each.is_file()}


def kept(cache: Path) -> list[str]:
    """Units that the one directory holds."""
    (folder,) = cache.iterdir()
    assert sorted(each.suffix for each in folder.iterdir() if each.suffix != ".safetensors") == [".json"]
    return sorted(each.stem for each in folder.glob("*.safetensors"))


CASES = [
    *(("llama", bits, first, second) for bits in (4, 8) for first, second in (("device", "thirds"), ("disk", "host"))),
    ("gpt2", 4, "20-80", "device"),  # a tied head
    ("qwen3-moe", 4, "thirds", "small"),  # merged experts
    ("bloom", 8, "host", "disk"),
]


@pytest.mark.parametrize(("family", "bits", "first", "second"), CASES)
def test_the_next_start_reads_them_and_answers_the_same(
    family: str,
    bits: int,
    first: str,
    second: str,
    build: Callable[[str], Path],
    only_kept: Callable[[], None],
    notices: Notices,
    tmp_path: Path,
    cache: Path,
) -> None:
    """Bit for bit under the same policy; nothing is written again, and other placements are served, too."""
    before = answers(build(family), tmp_path, bits, first, JOBS)
    written = files(cache)
    only_kept()
    assert answers(build(family), tmp_path, bits, first, JOBS) == before
    other = answers(build(family), tmp_path, bits, second, JOBS)
    assert [each[0] for each in other] == [each[0] for each in before]
    assert files(cache) == written
    assert notices() == []


@pytest.mark.parametrize("bits", [4, 8])
def test_files_hold_what_the_codec_makes_of_the_checkpoint(
    bits: int, build: Callable[[str], Path], tmp_path: Path, cache: Path
) -> None:
    answers(build("llama"), tmp_path, bits, "thirds")
    state = models.load_reference(build("llama")).state_dict()
    seen = {}
    for unit in kept(cache):
        (file,) = cache.glob(f"*/{unit}.safetensors")
        with safe_open(file, framework="pt") as opened:
            stored, layout = opened.get_tensor("bytes"), json.loads(opened.metadata()["layout"])
        for name, (first, end, _, is_coded) in layout.items():
            values, codec = state[name].flatten(), Codec(bits)
            parts = codec.encode(values) if is_coded else ()
            expected = join(codec, parts, values.numel()) if is_coded else values.view(torch.uint8)
            gap = expected == 255 if is_coded else torch.zeros_like(expected, dtype=torch.bool)  # or between parts
            assert (stored[first:end] == expected)[~gap].all(), name
            seen[name] = is_coded
    assert seen.keys() == state.keys()
    assert 0 < sum(seen.values()) < len(seen)


def flip(content: bytearray) -> None:
    content[-1000] ^= 1


def flip_header(content: bytearray) -> None:
    content[content.index(b"crc32") + 9] ^= 1


def cut(content: bytearray) -> None:
    del content[-64:]


def lengthen(content: bytearray) -> None:
    content += b"\0"


def garble(content: bytearray) -> None:
    content[:9] = b"\xff" * 9


@pytest.mark.parametrize("unit", ["layer.1", "embedding"])
@pytest.mark.parametrize("damage", [flip, flip_header, cut, lengthen, garble, bytearray.clear])
def test_a_damaged_file_is_told_and_written_anew(
    damage: Callable[[bytearray], None], unit: str, model: Path, notices: Notices, tmp_path: Path, cache: Path
) -> None:
    before = answers(model, tmp_path)
    written = files(cache)
    (file,) = cache.glob(f"*/{unit}.safetensors")
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    assert answers(model, tmp_path) == before
    (told,) = notices()
    assert str(file) in told
    assert "damaged" in told
    assert files(cache) == written
    assert answers(model, tmp_path) == before
    assert notices() == []


def test_a_file_of_another_layer_is_not_used(model: Path, notices: Notices, tmp_path: Path, cache: Path) -> None:
    """Of the same size, and whole."""
    before = answers(model, tmp_path)
    written = files(cache)
    (folder,) = cache.iterdir()
    shutil.copy(folder / "layer.0.safetensors", folder / "layer.1.safetensors")
    assert answers(model, tmp_path) == before
    assert len(notices()) == 1
    assert files(cache) == written


def change_values(model: Path) -> None:
    """The same size, and the same time of writing."""
    file = model / "model.safetensors"
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[-256:] = bytes(256)
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_time(model: Path) -> None:
    """What a value in the middle of a large tensor shows by."""
    os.utime(model / "model.safetensors", (1, 1))


def change_config(model: Path) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 500.0}))


@pytest.mark.parametrize("change", [change_values, change_time, change_config])
def test_a_changed_checkpoint_is_told_and_encoded_anew(
    change: Callable[[Path], None], model: Path, notices: Notices, tmp_path: Path, cache: Path
) -> None:
    answers(model, tmp_path)
    (before,) = cache.iterdir()
    change(model)
    first = answers(model, tmp_path)
    (told,) = notices()
    assert str(model) in told
    assert "changed" in told
    (after,) = cache.iterdir()
    assert after != before
    assert kept(cache) == UNITS
    assert answers(model, tmp_path) == first
    assert notices() == []


def test_other_versions_encode_anew(
    model: Path, notices: Notices, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another transformers may give the checkpoint's tensors another order."""
    answers(model, tmp_path)
    monkeypatch.setattr(kept_weights.transformers, "__version__", "9.9.9")
    answers(model, tmp_path)
    (told,) = notices()
    assert "other versions" in told
    assert kept(cache) == UNITS


def test_models_codecs_and_dtypes_have_their_own(
    model: Path, build: Callable[[str], Path], notices: Notices, tmp_path: Path, cache: Path
) -> None:
    for number, (path, bits) in enumerate(((model, 4), (model, 8), (build("llama"), 4)), start=1):
        answers(path, tmp_path, bits)
        assert len([*cache.iterdir()]) == number
    with Engine.from_pretrained(str(model), policy={"device": "cpu", "compress-weight": 4, "dtype": "bfloat16"}) as one:
        one.wait_until_loaded()
    assert len([*cache.iterdir()]) == 4
    assert notices() == []


def test_nothing_is_kept_without_a_codec(model: Path, cache: Path) -> None:
    with Engine.from_pretrained(str(model), policy={"device": "cpu"}) as engine:
        engine.run([JOB])
    assert not cache.exists()


def test_nothing_is_kept_where_nothing_is_encoded(tmp_path: Path, cache: Path) -> None:
    """Matrices of no multiple of 64 numbers."""
    sizes = {"hidden_size": 36, "intermediate_size": 35, "num_attention_heads": 2, "num_key_value_heads": 1}
    path = models.save_model(tmp_path / "odd", "llama", **sizes)
    assert answers(path, tmp_path)
    assert not cache.exists()


def test_a_hub_model_is_known_by_its_revision(
    build: Callable[[str], Path], notices: Notices, tmp_path: Path, cache: Path
) -> None:
    """Files of the hub's cache are links to blobs, whose times of writing say nothing; nothing is put there."""
    hub = tmp_path / "hub" / "models--acme--rocket"
    (hub / "blobs").mkdir(parents=True)
    for revision in ("r1", "r2"):
        snapshot = hub / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file in build("llama").iterdir():
            blob = hub / "blobs" / f"{file.name}-{revision if file.suffix == '.safetensors' else ''}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
    before = sorted(hub.rglob("*"))
    answers(hub / "snapshots" / "r1", tmp_path)
    (folder,) = cache.iterdir()
    assert folder.name.startswith("acme--rocket-4bit-float32-")
    os.utime(hub / "blobs" / "model.safetensors-r1", (1, 1))
    answers(hub / "snapshots" / "r1", tmp_path)
    assert notices() == []
    answers(hub / "snapshots" / "r2", tmp_path)
    assert len(notices()) == 1
    assert kept(cache) == UNITS
    assert sorted(hub.rglob("*")) == before


def full(_: int, __: int, size: int, count: Any = [0]) -> None:  # noqa: B006 - counts the calls
    count[0] += 1
    if count[0] % 3 == 0:
        raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_leaves_nothing(
    model: Path, notices: Notices, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(unit_file.os, "posix_fallocate", full)
        before = answers(model, tmp_path)
    (told,) = notices()
    assert "No space left on device" in told
    assert "XDG_CACHE_HOME" in told
    assert [*cache.iterdir()] == []
    assert answers(model, tmp_path) == before
    assert kept(cache) == UNITS


def test_a_file_that_cannot_be_written_whole_leaves_nothing(
    model: Path, notices: Notices, tmp_path: Path, cache: Path
) -> None:
    """The system itself refuses, at a size below that of the largest file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        answers(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (told,) = notices()
    assert "not kept" in told
    assert [*cache.iterdir()] == []


def test_a_disk_without_room_is_not_filled(
    model: Path, notices: Notices, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    answers(model, tmp_path)
    (told,) = notices()
    assert "GB are free" in told
    assert [*cache.iterdir()] == []


def test_many_damaged_files_are_one_notice(model: Path, notices: Notices, tmp_path: Path, cache: Path) -> None:
    before = answers(model, tmp_path)
    written = files(cache)
    for file in cache.glob("*/layer.*"):
        file.write_bytes(b"")
    assert answers(model, tmp_path) == before
    assert len(notices()) == 1
    assert files(cache) == written


def test_a_cache_directory_that_cannot_be_made_is_told(
    model: Path, notices: Notices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = answers(model, tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answers(model, tmp_path) == before
    told = [each for each in notices() if "encoded weights" in each]
    assert len(told) == 1
    assert "Not a directory; XDG_CACHE_HOME" in told[0]


def start(model: Path, code: str = "") -> subprocess.Popen[str]:
    """A process that keeps the model's weights and prints its answer."""
    script = f"""
import sys
from engine import Engine, Job
from engine.weights.encoded import unit_file
{code}
with Engine.from_pretrained({str(model)!r}, policy={{"device": "cpu", "compress-weight": 4}}) as engine:
    print(engine.run([Job(prompt=[*range(10, 40)], max_new_tokens=3)])[0].tokens)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.usefixtures("warm_processes")
def test_a_start_that_was_killed_is_continued(
    model: Path, notices: Notices, only_kept: Callable[[], None], tmp_path: Path, cache: Path
) -> None:
    """Its whole files are used, and what it left half is gone."""
    code = """
import os, signal
whole, sums = unit_file.zlib.crc32, []
def crc32(piece):
    sums.append(whole(piece))
    if len(sums) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums[-1]
unit_file.zlib = type("zlib", (), {"crc32": staticmethod(crc32)})
"""
    process = start(model, code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (folder,) = cache.iterdir()
    assert len([*folder.glob("*.safetensors")]) == 3
    assert len([*folder.glob(".*")]) == 1
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    before = answers(model, tmp_path)
    assert kept(cache) == UNITS
    assert times.items() <= {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}.items()
    only_kept()
    assert answers(model, tmp_path) == before
    assert notices() == []


@pytest.mark.usefixtures("warm_processes")
def test_two_processes_at_once(model: Path, only_kept: Callable[[], None], tmp_path: Path, cache: Path) -> None:
    together = [start(model) for _ in range(2)]
    told = [process.communicate(timeout=60) for process in together]
    assert [process.returncode for process in together] == [0, 0]
    assert told[0][0] == told[1][0]
    assert all("flexgen-helm" not in said for _, said in told)
    assert kept(cache) == UNITS
    only_kept()
    assert str(answers(model, tmp_path)[0][0]) in told[0][0]


def test_what_another_process_writes_is_left_alone(model: Path, notices: Notices, tmp_path: Path, cache: Path) -> None:
    """The lock of a directory is the other's as long as it lives."""
    answers(model, tmp_path)
    (folder,) = cache.iterdir()
    for file in folder.iterdir():
        file.unlink()
    left = folder / ".layer.9.safetensors.partial"
    left.write_bytes(b"half")
    lock = kept_weights._locked(folder)
    assert lock is not None
    answers(model, tmp_path)
    assert [*folder.iterdir()] == [left]
    os.close(lock)
    answers(model, tmp_path)
    assert kept(cache) == UNITS
    assert notices() == []


def test_closing_an_engine_that_loads_leaves_whole_files(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the piece that is being written, and for no other."""
    opened: list[KeptWeights] = []
    writing, closing = threading.Event(), threading.Event()
    enter, put, stored = KeptWeights.__enter__, WeightStore.put, WeightStore.stored_bytes

    def entering(self: KeptWeights) -> KeptWeights:
        opened.append(self)
        return enter(self)

    def putting(self: WeightStore, name: str, *rest: Any, **others: Any) -> None:
        if ".2." in name:
            assert closing.wait(20)
        put(self, name, *rest, **others)

    def reading(self: WeightStore, *place: Any) -> torch.Tensor:
        writing.set()
        for _ in range(300):
            if opened[0]._stopping:
                break
            time.sleep(0.01)
        return stored(self, *place)

    with monkeypatch.context() as patch:
        patch.setattr(KeptWeights, "__enter__", entering)
        patch.setattr(WeightStore, "put", putting)
        patch.setattr(WeightStore, "stored_bytes", reading)
        engine = Engine.from_pretrained(str(model), policy={"device": "cpu", "compress-weight": 4})
        assert writing.wait(20)
        closer = threading.Thread(target=engine.close)
        closer.start()
        while not engine._loop._closing:
            time.sleep(0.01)
        closing.set()  # the loader sees it behind the parameter in hand
        closer.join(20)
        assert not closer.is_alive()
        with pytest.raises(EngineError, match="closed"):
            engine.run([JOB])
    assert kept(cache) == ["embedding"]
    assert not any(thread.name == "flexgen-keep" for thread in threading.enumerate())
    answers(model, tmp_path)
    assert kept(cache) == UNITS
