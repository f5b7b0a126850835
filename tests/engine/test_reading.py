"""Protects: files from outside are read within bounds, or refused in one line of the kind that the caller names."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import CheckpointError, ConfigError, EngineError
from engine.planning.hardware_profile import HardwareProfile
from engine.policy import Policy
from engine.reading import find_file, read_bytes, read_json, read_json_object, read_yaml

ROOT = Path(__file__).resolve().parents[2]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(10)
)
"""Ten thousand million values once its aliases are written out."""

BAD_YAML: dict[str, tuple[str, str]] = {
    "no number": ("a: !!int x", r"is not YAML: found 'x', which is no int in .*line 1, column 4"),
    "no time": ("b: 1\na: !!timestamp x", r"is not YAML: found 'x', which is no timestamp in .*line 2, column 4"),
    "no hour": ("a: 2026-01-01 25:61:00", "is not YAML: found '2026-01-01 25:61:00', which is no timestamp"),
    "no truth": ("a: !!bool maybe", "is not YAML: found 'maybe', which is no bool"),
    "one key twice": ("device: cpu\ndtype: auto\ndevice: cuda", r"found the key 'device' twice in .*line 3, column 1"),
    "one key twice, inside": ("a: {b: 1, b: 1}", "found the key 'b' twice"),
    "an object of Python": ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    "a date that there is not": ("a: 2026-13-13", "is not YAML: found '2026-13-13', which is no timestamp"),
    "nested deep": ("[" * 5000, "nested more than 100 levels"),
    "nested": ("[" * 150 + "]" * 150, "nested more than 100 levels"),
    "aliases": (BOMB, "more than 200,000 values"),
    "a circle": ("a: &a [*a]", "nested more than 100 levels"),
    "digits": ("a: 0x" + "f" * 1000, "a number of 4000 bits"),
    "more digits": ("a: " + "9" * 5000, "is not YAML"),
    "half a character": ('a: "\\ud800"', "is not YAML|no Unicode"),
    "length": ("# " + "x" * (1 << 18), "more than 262,144 bytes"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_yaml_that_cannot_be_meant_is_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    content, expected = BAD_YAML[kind]
    file = tmp_path / "policy.yaml"
    file.write_text(content)
    begin = time.perf_counter()
    for read in (lambda: read_yaml(file, ConfigError), lambda: Policy.load(file), lambda: HardwareProfile.load(file)):
        with pytest.raises(ConfigError, match=expected) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)
        assert len(str(caught.value)) < 1000
    assert time.perf_counter() - begin < 20


def test_a_mapping_may_be_merged_and_changed(tmp_path: Path) -> None:
    """A key that stands there again takes the place of the merged one, and is no key that is there twice."""
    file = tmp_path / "x.yaml"
    file.write_text("a: {deep: &x {k: 1, l: 1}}\nb: {<<: *x, k: 2}\n")
    assert read_yaml(file, ConfigError) == {"a": {"deep": {"k": 1, "l": 1}}, "b": {"k": 2, "l": 1}}


BAD_JSON: dict[str, tuple[bytes, str]] = {
    "nested deep": (b"[" * 100_000, "nested more than 100 levels"),
    "nested": (b"[" * 150 + b"]" * 150, "nested more than 100 levels"),
    "digits": (b"9" * 100, "a number of 100 digits"),
    "half a character": (b'["\\udfff"]', "no Unicode text"),
    "no UTF-8": (b'["\xff"]', "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "a list": (b"[]", "a JSON object is expected"),
    "escape sequences": (b"\x1b[31m", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_cannot_be_meant_is_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    content, expected = BAD_JSON[kind]
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_json_object(file, CheckpointError)
    assert str(caught.value).isprintable()
    assert str(file) in str(caught.value)


def test_what_is_usual_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text('{"model_max_length": 1000000000000000019884624838656, "a": [1.5, null, true, "é𝄞", Infinity]}')
    told = read_json(file, CheckpointError)
    assert told["model_max_length"] == int(1e30)
    assert told["a"] == [1.5, None, True, "é𝄞", float("inf")]
    file.write_text("a: &a {b: 1}\nc: *a\n")
    assert read_yaml(file, ConfigError) == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_file_may_be_as_long_as_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"12345678")
    assert read_bytes(file, ConfigError, limit=8) == b"12345678"
    with pytest.raises(ConfigError, match="more than 7 bytes"):
        read_bytes(file, ConfigError, limit=7)


WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from engine.reading import read_bytes
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (50 << 20),) * 2)
print(len(read_bytes(Path(sys.argv[1]), ValueError, limit=4_000_000_000)))
"""


def test_a_large_limit_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{3 << 20}\n", "")


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket or a loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("load", [Policy.load, HardwareProfile.load])
def test_what_is_no_regular_file_is_refused_at_once(load: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    ODD[kind](file)
    for read in (load, lambda path: find_file(path, ConfigError), lambda path: read_bytes(path, ConfigError, limit=9)):
        with pytest.raises(ConfigError) as caught:
            read(file)
        assert "\n" not in str(caught.value)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["~nosuchuser/x.yaml", "x" * 5000 + ".yaml", "a\0b.yaml", "~nosuchuser/x", "x" * 300])
@pytest.mark.parametrize("load", [Policy.load, HardwareProfile.load])
def test_names_that_are_no_file_are_told(load: Callable[[str], object], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


POLICIES: list[dict[str, object]] = [
    {"gpu-memory": int("9" * 300)},
    {"gpu-memory": "9" * 400},
    {"cpu-memory": 10**5000},
    {"cpu-memory": float("inf")},
    {"cpu-memory": 1e300},
    {"gpu-memory": True},
    {"gpu-memory": [16]},
    {"gpu-batch-size": 10**12},
    {"num-gpu-batches": 2**31},
    {"pad-to-seq-len": 10**20},
    {"offload-dir": "~nosuchuser/x"},
    {"weights": {"gpu": float("nan"), "cpu": 100}},
    {"percent": [float("nan"), 0, 0, 0, 0, 0]},
    {"percent": [10**400, 0, 0, 0, 0, 0]},
    {"device": "x" * 100_000},
    {"dtype": "\x1b[31m"},
    {"x" * 100_000: 1},
    {("a", "b"): 1},  # type: ignore[dict-item]
]


@pytest.mark.parametrize("mapping", POLICIES, ids=lambda mapping: str(next(iter(mapping)))[:20])
def test_policies_that_cannot_be_meant_are_refused_in_a_line(mapping: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy.from_mapping(mapping)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_sizes_that_machines_have_are_taken() -> None:
    assert Policy.from_mapping({"cpu-memory": "2TB", "gpu-memory": 80}).cpu_memory == 2 * 10**12
    assert Policy.from_mapping({"cpu-memory": "1000000GiB"}).cpu_memory == 10**6 * 2**30


def test_errors_are_of_the_kind_that_was_named(tmp_path: Path) -> None:
    for kind in (CheckpointError, ConfigError, EngineError):
        with pytest.raises(kind) as caught:
            read_json(tmp_path / "missing", kind)
        assert type(caught.value) is kind
        assert "No such file" in str(caught.value)


def test_reading_loads_nothing_heavy() -> None:
    code = "import engine.reading, sys; print({'torch', 'transformers', 'numpy', 'helm'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
