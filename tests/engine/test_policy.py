"""Protects: a policy means what its file says, and whatever cannot be meant is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine import Policy
from engine.errors import ConfigError
from engine.policy import Share, policy_directories
from engine.reading import parse_bytes

KEYS = {
    "gpu-batch-size", "num-gpu-batches", "percent", "weights", "kv-cache", "activations", "pad-to-seq-len",
    "compress-weight", "compress-cache", "cpu-cache-compute", "pin-weight", "overlap", "share-prefix", "dtype",
    "device", "gather-weights", "gpu-memory", "cpu-memory", "offload-dir", "batch-invariant",
    "draft-model", "stages",
}  # fmt: skip


def refused(mapping: dict[str, Any]) -> str:
    """The one line that refuses `mapping`."""
    with pytest.raises(ConfigError) as caught:
        Policy.from_mapping(mapping)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_contract_s_example_reads() -> None:
    policy = Policy.from_mapping(
        yaml.safe_load("""
            gpu-batch-size: 48
            num-gpu-batches: 3
            percent: [20, 80, 0, 100, 0, 100]
            pad-to-seq-len: null
            compress-weight: false
            compress-cache: false
            cpu-cache-compute: false
            pin-weight: true
            overlap: true
            share-prefix: true
            dtype: auto
            device: auto
            gpu-memory: null
            cpu-memory: null
            offload-dir: null
            """)
    )
    assert policy.weights == Share(gpu=20, cpu=80, disk=0)
    assert policy.kv_cache == policy.activations == Share(gpu=0, cpu=100, disk=0)
    assert (policy.gpu_batch_size, policy.num_gpu_batches) == (48, 3)
    spelled_out = {
        "gpu-batch-size": 48,
        "num-gpu-batches": 3,
        "weights": {"gpu": 20, "cpu": 80},
        "kv-cache": {"cpu": 100},
        "activations": {"gpu": 0, "cpu": 100, "disk": 0},
    }
    assert Policy.from_mapping(spelled_out) == policy


def test_every_key_of_the_contract_is_known_and_no_other() -> None:
    message = refused({"zzz": 1})
    assert set(re.findall(r"[a-z-]+", message.split("known:")[1])) == KEYS


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("gpu-batchsize", "gpu-batch-size"),
        ("kv_cache", "kv-cache"),
        ("percents", "percent"),
        ("pin-weights", "pin-weight"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(wrong: str, meant: str) -> None:
    message = refused({wrong: 1})
    assert repr(wrong) in message
    assert f"did you mean {meant!r}" in message
    assert "did you mean 'cpu'" in refused({"weights": {"gpu": 20, "cpus": 80}})


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"weights": {"gpu": 20, "cpu": 70}}, ["weights", "90", "100"]),
        ({"kv-cache": {"gpu": 60, "cpu": 60}}, ["kv-cache", "120", "100"]),
        ({"weights": {"gpu": -20, "cpu": 120}}, ["weights.gpu", "-20"]),
        ({"activations": {"gpu": 101}}, ["activations.gpu", "101"]),
        ({"weights": {"gpu": float("nan"), "cpu": 100}}, ["weights.gpu", "nan"]),
        ({"weights": {"gpu": "20", "cpu": 80}}, ["weights.gpu", "'20'"]),
        ({"weights": {"gpu": True, "cpu": 99}}, ["weights.gpu", "True"]),
        ({"weights": 20}, ["weights", "20", "{gpu: 20, cpu: 80, disk: 0}"]),
        ({"percent": [20, 80, 0, 100, 0]}, ["six", "got 5"]),
        ({"percent": [20, 80, 0, 100, 0, 100, 0]}, ["six", "got 7"]),
        ({"percent": 20}, ["six", "got 1"]),
        ({"percent": [20, 90, 0, 100, 0, 100]}, ["weights", "gpu 20 + cpu 90 = 110"]),
        ({"percent": [20, 80, -5, 100, 0, 100]}, ["percent[2]", "-5"]),
        ({"percent": [100, 0, 100, 0, 100, 0], "weights": {"gpu": 100}}, ["percent", "not both"]),
        ({"percent": [20, 70, 0, 100, 0, 100]}, ["offload-dir", "disk"]),
        ({"kv-cache": {"disk": 100}}, ["offload-dir", "disk"]),
        ({"offload-dir": {"gpu": 99}}, ["offload-dir: {'gpu': 99} is not the name of a directory"]),
        ({"offload-dir": 5}, ["offload-dir: 5 is not the name of a directory"]),
        ({"offload-dir": ""}, ["offload-dir: '' is not the name of a directory"]),
        ({"offload-dir": "a\0b"}, ["offload-dir: 'a\\x00b' is not the name of a directory"]),
        ({"offload-dir": "x/" * 3000}, ["offload-dir", "is not the name of a directory"]),
        ({"gpu-batch-size": 0}, ["gpu-batch-size", "0"]),
        ({"num-gpu-batches": 2.5}, ["num-gpu-batches", "2.5"]),
        ({"gpu-batch-size": True}, ["gpu-batch-size", "True"]),
        ({"pad-to-seq-len": "buckets"}, ["pad-to-seq-len", "'buckets'"]),
        ({"pad-to-seq-len": 0}, ["pad-to-seq-len", "0"]),
        ({"pad-to-seq-len": 10**9}, ["pad-to-seq-len", "1000000000", "131,072"]),
        ({"compress-weight": 3}, ["compress-weight", "3", "lossless"]),
        ({"compress-cache": "lossless"}, ["compress-cache", "none of false, 4, 8"]),
        ({"overlap": "yes"}, ["overlap", "'yes'"]),
        ({"dtype": "floaty16"}, ["dtype", "float16"]),
        ({"device": "gpu"}, ["device", "'gpu'", "cuda"]),
        ({"device": ["cuda:0", "cuda:00"]}, ["device", "cuda:0", "2 times"]),
        ({"device": ["cuda:0", "cpu:0"]}, ["device", "cuda and cpu", "one kind"]),
        ({"device": ["cuda", "cuda:1"]}, ["device", "'cuda'", "number"]),
        ({"device": ["cuda:0", 1]}, ["device", "1", "[cuda:0, cuda:1]"]),
        ({"device": []}, ["device", "no device"]),
        ({"device": "cuda:0, cuda:1"}, ["device", "list such as"]),
        ({"device": None}, ["device", "None"]),
        ({"device": "cuda:1", "gather-weights": True}, ["gather-weights", "cuda:1", "several"]),
        ({"gather-weights": 2}, ["gather-weights", "2", "auto, true, false"]),
        ({"gpu-memory": "16 gigs"}, ["gpu-memory", "'16 gigs'", "16GB"]),
        ({"cpu-memory": -1}, ["cpu-memory", "-1"]),
        ({"cpu-memory": 0}, ["cpu-memory", "0"]),
        ({"gpu-memory": True}, ["gpu-memory", "True"]),
        ({"gpu-memory": [16]}, ["gpu-memory", "[16]"]),
    ],
)
def test_what_cannot_be_meant_is_refused(mapping: dict[str, Any], parts: list[str]) -> None:
    message = refused(mapping)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        (16, 16 * 2**30),
        ("16", 16 * 2**30),
        (0.5, 2**29),
        ("1.5 TB", 1_500 * 10**9),
        ("512mib", 2**29),
        ("100kB", 100_000),
    ],
)
def test_sizes(value: Any, size: int) -> None:
    assert parse_bytes(value, "gpu-memory") == size


def test_compress_true_means_four_bits() -> None:
    policy = Policy.from_mapping({"compress-weight": True, "compress-cache": 8})
    assert (policy.compress_weight, policy.compress_cache) == (4, 8)
    assert Policy.from_mapping({"compress-weight": False}).compress_weight is None


def test_auto_is_a_policy_and_a_file_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("auto\n")
    assert Policy.load("auto") == Policy.load(None) == Policy.load(file) == Policy()


def test_shipped_policies_load_by_name_and_names_are_suggested() -> None:
    files = [file for folder in policy_directories() for file in folder.glob("*.yaml")]
    assert files
    for file in files:
        assert Policy.load(file.stem) == Policy.load(file) != Policy()
    with pytest.raises(ConfigError, match="did you mean 'opt-30b-t4'"):
        Policy.load("opt-30-t4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("percent: [1, 2", "is not YAML"),
        ("- a list", "is not a mapping"),
        ("", "is not a mapping"),
        ("gpu-batch-sizes: 4", "unknown key 'gpu-batch-sizes'; did you mean 'gpu-batch-size'"),
    ],
)
def test_a_bad_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Policy.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no/such\.yaml"):
        Policy.load(tmp_path / "no" / "such.yaml")
    with pytest.raises(ConfigError, match="no-such-policy"):
        Policy.load("no-such-policy")
    with pytest.raises(ConfigError, match=r"shipped policy 'opt-6\.7b-t4'"):  # a dot does not make a name a file
        Policy.load("opt-6.7b-t4")


@st.composite
def shares(draw: st.DrawFn) -> Share:
    gpu = draw(st.integers(0, 100))
    cpu = draw(st.integers(0, 100 - gpu))
    return Share(gpu=float(gpu), cpu=float(cpu), disk=float(100 - gpu - cpu))


policies = st.builds(
    Policy,
    gpu_batch_size=st.none() | st.integers(1, 1000),
    num_gpu_batches=st.none() | st.integers(1, 1000),
    weights=st.none() | shares(),
    kv_cache=st.none() | shares(),
    activations=st.none() | shares(),
    pad_to_seq_len=st.sampled_from([None, "bucket", 512]),
    compress_weight=st.sampled_from([None, 4, 8]),
    compress_cache=st.sampled_from([None, 4, 8]),
    cpu_cache_compute=st.booleans(),
    pin_weight=st.booleans(),
    overlap=st.booleans(),
    share_prefix=st.booleans(),
    dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16"]),
    device=st.sampled_from(
        ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu:0", "all", ("cuda:0", "cuda:3"), ("cpu:0", "cpu:1")]
    ),
    gpu_memory=st.none() | st.integers(1, 2**45),
    cpu_memory=st.none() | st.integers(1, 2**45),
    offload_dir=st.just("/some/where"),
)


@given(policy=policies)
def test_a_policy_survives_yaml(policy: Policy) -> None:
    mapping = policy.as_mapping()
    assert set(mapping) <= KEYS
    assert Policy.from_mapping(yaml.safe_load(yaml.safe_dump(mapping))) == policy


def test_defaults_are_left_out_of_the_mapping() -> None:
    assert Policy().as_mapping() == {}
