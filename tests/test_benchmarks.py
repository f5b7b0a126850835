"""Protects: what benchmarks count and compute is right by hand, and `flexgen-helm bench` runs whole, without HELM."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import models
import pytest
import torch

from benchmarks import (
    card_time,
    codecs,
    compression,
    data_wrangling,
    draw,
    experts,
    inspect_mmlu,
    long_answers,
    memory,
    mixtures,
    offloaded,
    several_gpus,
    sweep_overhead,
    sweep_suite,
    timeline,
    together,
)
from benchmarks.rivals import contender, freetoken, generate_batch, run
from engine import Job, Policy
from engine.errors import CheckpointError, ConfigError
from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.policy import Share
from engine.weights.binding import stored_bytes
from engine.weights.portion import Portion
from flexgen_helm.commands.bench import CURVE, ROWS, bench_policy, table_line, workloads
from flexgen_helm.planning.dummy import _random_block, open_dummy, random_model, shape_config
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Rates, Work, Workload, least_seconds, measure_rates, num_at_once, work_of
from flexgen_helm.planning.shapes import SHAPES
from flexgen_helm.planning.sizes import Sizes

ROOT = Path(__file__).resolve().parent.parent
OPT = {
    "model_type": "opt",
    "dtype": "float32",
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MOE = {
    "model_type": "qwen3_moe",
    "dtype": "float32",
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def opt(tmp_path: Path) -> str:
    file = tmp_path / "tiny-opt.json"
    file.write_text(json.dumps(OPT))
    return str(file)


@pytest.fixture
def moe(tmp_path: Path) -> str:
    file = tmp_path / "tiny-moe.json"
    file.write_text(json.dumps(MOE))
    return str(file)


def plan(*, device: int = 0, host: int = 10**9, **changes: Any) -> Plan:
    made = Plan(
        weights=Share(gpu=50, cpu=50),
        kv_cache=None,
        activations=Share(gpu=100, cpu=0),
        cache_budgets={"device": device, "host": host, "disk": 0},
        limits=Limits(
            sequences_per_batch=8, batches=2, rows_per_batch=64, cached_rows_per_batch=999, rows_per_sweep=1000
        ),
    )
    return replace(made, **changes)


SIZES = Sizes(
    layer_parameters=1000,
    head_parameters=50,
    attention_width=10,
    sweep_bytes=2100,
    streamed_bytes=1100,
    disk_bytes=0,
    cache_row_bytes=8,
    device_cache_row_bytes=8,
    expanded_bytes=0,
    expert_bytes=0,
    hidden_row_bytes=4,
    num_layers=3,
)


def test_states_take_room_and_cross_the_link_with_every_step() -> None:
    """12 tokens of 8 bytes and a state of 1000: 4 sequences have room; 8 take 2 further steps each."""
    sizes, load = replace(SIZES, state_bytes=1000), Workload(1, 8, 0, 10, 3)
    assert num_at_once(load, sizes, plan(host=5000)) == 4
    states, none = (work_of(load, each, plan(host=10**6)) for each in (sizes, SIZES))
    assert states.to_device_bytes - none.to_device_bytes == 8 * 2 * 1000
    assert states.from_device_bytes - none.from_device_bytes == 8 * 3 * 1000
    assert states.device_bytes - none.device_bytes == 2 * 8 * 2 * 1000


class TestWorkload:
    def test_is_written_as_it_is_read(self) -> None:
        load = Workload.parse("10x100x400+70:5")
        assert load == Workload(10, 100, 400, 70, 5)
        assert str(load) == "10x100x400+70:5"
        assert load.num_requests == 1000
        assert load.prefill_tokens == 10 * (400 + 100 * 70)

    @pytest.mark.parametrize("text", ["", "1x2x3", "1x2x3+4", "1x2x3+4:", "1x2x3+0:1", "0x2x3+4:1", "1x2x3+4:0"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="workload"):
            Workload.parse(text)

    def test_prompts_share_within_a_run_only(self) -> None:
        prompts = Workload.parse("2x3x20+4:1").prompts(1000)
        assert [len(prompt) for prompt in prompts] == [24] * 6
        heads = [tuple(prompt[:20]) for prompt in prompts]
        assert heads[:3] == [heads[0]] * 3
        assert heads[3:] == [heads[3]] * 3
        assert heads[0] != heads[3]
        assert len({tuple(prompt) for prompt in prompts}) == 6

    def test_a_rehearsal_claims_the_same_cache(self) -> None:
        load = Workload.parse("1x4x10+512:32")
        rehearsal = load.rehearsal(100)
        assert rehearsal.own + rehearsal.new == load.own + load.new
        assert rehearsal.new == 2
        assert Workload.parse("1x4x10+512:1").rehearsal(100) == Workload.parse("1x4x10+512:1")

    def test_a_rehearsal_has_none_that_wait(self) -> None:
        load = Workload.parse("6x100x0+512:32")
        assert [load.rehearsal(seats).num_runs for seats in (1, 100, 101, 250, 600, 10**4)] == [1, 1, 2, 3, 6, 6]


class TestLimit:
    def test_one_token_each_needs_no_cache(self) -> None:
        work = work_of(Workload.parse("2x3x20+5:1"), SIZES, plan())
        # 2 x (20 + 3 x 5) tokens; pairs of a run: 20 x 21 / 2 of the prefix, and 5 x 20 + 5 x 6 / 2 of each request
        assert work == Work(
            sweeps=1,
            flop=2 * 1000 * 70 + 2 * 50 * 6 + 2 * 10 * (2 * 210 + 6 * 115),
            to_device_bytes=1100,
            from_device_bytes=0,
            device_bytes=2100,
        )

    def test_keys_and_values_cross_the_link_each_step(self) -> None:
        # 4 sequences of 10 + 2 kept rows; the device has room for one of them.
        work = work_of(Workload.parse("1x4x0+10:3"), SIZES, plan(device=12 * 8 + 7))
        assert work.sweeps == 3
        assert work.to_device_bytes == 3 * 1100 + 3 * (10 + 11) * 8  # three sequences, two decode steps
        assert work.from_device_bytes == 3 * 12 * 8
        assert work.device_bytes == 3 * 2100 + 1 * (10 + 11) * 8
        assert work.flop == 2 * 1000 * (40 + 8) + 2 * 50 * 12 + 2 * 10 * 4 * (12 * 13 / 2)

    def test_attention_on_the_host_moves_no_keys(self) -> None:
        load = Workload.parse("1x4x0+10:3")
        assert work_of(load, SIZES, plan(), cache_crosses=False).to_device_bytes == 3 * 1100
        assert work_of(load, SIZES, plan()).to_device_bytes == 3 * 1100 + 4 * 21 * 8

    def test_shares_decide_where_a_policy_names_them(self) -> None:
        quarter = plan(device=10**9, kv_cache=Share(gpu=25, cpu=75), activations=Share(gpu=50, cpu=50))
        work = work_of(Workload.parse("1x4x0+10:3"), SIZES, quarter)
        hidden = 48 * 4 * 3 / 2
        assert work.to_device_bytes == 3 * 1100 + 3 * 21 * 8 + hidden
        assert work.from_device_bytes == 3 * 12 * 8 + hidden

    def test_what_does_not_fit_at_once_takes_further_sweeps(self) -> None:
        load = Workload.parse("1x40x0+10:3")
        assert work_of(load, SIZES, plan()).sweeps == 3 * 3  # 16 seats
        assert work_of(load, SIZES, plan(host=12 * 8 * 5)).sweeps == 8 * 3  # room for 5 sequences
        few = replace(plan().limits, rows_per_sweep=100)
        assert work_of(Workload.parse("1x16x0+10:1"), SIZES, plan(limits=few)).sweeps == 2
        assert work_of(Workload.parse("1x16x0+10:3"), SIZES, plan(limits=few)).sweeps == 4

    def test_the_largest_share_of_time_is_the_limit(self) -> None:
        work = Work(sweeps=1, flop=100.0, to_device_bytes=60.0, from_device_bytes=8.0, device_bytes=10.0)
        rates = Rates(flop_s=50.0, to_device_bytes_s=20.0, from_device_bytes_s=4.0, device_bytes_s=10.0)
        assert least_seconds(work, rates) == {
            "arithmetic": 2.0,
            "to device": 3.0,
            "from device": 2.0,
            "device memory": 1.0,
        }

    def test_sizes_are_those_of_the_stock_model(self, opt: str) -> None:
        model = random_model(opt)
        matrices = sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim > 1)
        layers = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
        with open_dummy(opt, Policy.from_mapping({"device": "cpu", "percent": [0, 100, 0, 100, 100, 0]})) as engine:
            sizes = sizes_of(engine)
        assert sizes.layer_parameters == matrices == 2 * (4 * 32 * 32 + 2 * 32 * 64)
        assert sizes.head_parameters == 128 * 32
        assert sizes.attention_width == 2 * 4 * (8 + 8)
        assert sizes.cache_row_bytes == 2 * 2 * 32 * 4
        assert sizes.hidden_row_bytes == 32 * 4
        assert 4 * (layers + 128 * 32) <= sizes.streamed_bytes <= 4 * (layers + 128 * 32) + 64 * 40
        assert sizes.sweep_bytes == sizes.streamed_bytes

    def test_only_the_experts_a_token_is_routed_to_compute(self, moe: str) -> None:
        with open_dummy(moe, Policy.from_mapping({"device": "cpu", "percent": [100, 0, 100, 0, 100, 0]})) as engine:
            sizes = sizes_of(engine)
        attention = 32 * 32 * 2 + 2 * 32 * 16
        assert sizes.layer_parameters == 2 * (attention + 4 * 32 + 2 * 3 * 32 * 16)
        assert sizes.streamed_bytes == 0
        assert sizes.sweep_bytes >= 4 * 2 * (attention + 4 * 3 * 32 * 16)

    def test_rates_are_measured(self) -> None:
        rates = measure_rates(torch.device("cpu"), torch.float32)
        assert all(1e7 < rate < 1e15 for rate in vars(rates).values())


class TestDummy:
    def test_every_contender_has_the_same_weights(self, opt: str) -> None:
        prompts = Workload.parse("1x3x0+9:6").prompts(128)
        with open_dummy(opt, Policy.from_mapping({"device": "cpu", "percent": [30, 70, 0, 100, 100, 0]})) as engine:
            ours = [done.tokens for done in engine.run(Job(prompt=prompt, max_new_tokens=6) for prompt in prompts)]
        model = random_model(opt)
        theirs = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(3, 9), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        assert ours == [tuple(row[9:]) for row in theirs.tolist()]

    @pytest.mark.parametrize(
        ("shape", "billions"),
        [
            ("opt-1.3b", 1.3),
            ("opt-6.7b", 6.7),
            ("opt-13b", 13),
            ("opt-30b", 30),
            ("llama-3-8b", 8.0),
            ("qwen3-30b-a3b", 30.5),
        ],
    )
    def test_shapes_have_the_size_in_their_name(self, shape: str, billions: float) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = shape_config(shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.025)

    def test_unknown_shapes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"opt-31b.*opt-30b"):
            shape_config("opt-31b")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="model_type"):
            shape_config(str(tmp_path))
        assert shape_config("opt-30b") is not SHAPES["opt-30b"]


def test_encoded_dummy_weights_are_those_that_are_encoded_on_loading(opt: str) -> None:
    """The random block is encoded once, and repeated."""
    policy = Policy.from_mapping({"device": "cpu", "compress-weight": 4})
    with open_dummy(opt, policy) as engine:
        store, stream = engine.parts.weights, engine.parts.stream
        name = min(name for placed in store.placed.values() for name in placed.coded)
        placed, extent = store._extent_of[name]
        found = stored_bytes(Portion.whole(placed), stream._outer.memory, extent.first, extent.end).clone()
        store.put(name, _random_block()[: store.model.state[name].numel()])
        assert found.equal(stored_bytes(Portion.whole(placed), stream._outer.memory, extent.first, extent.end))
        assert found.any()


@pytest.mark.usefixtures("warm_processes")
def test_a_comparison_with_stock_layers_is_timed_beside_its_run(opt: str, tmp_path: Path) -> None:
    rows = ["1x3x0+8:4", "2x2x20+4:1"]
    policy = tmp_path / "policy.yaml"
    policy.write_text("device: cpu\npercent: [0, 100, 0, 100, 100, 0]\n")
    limits = ["--policy", str(policy), "--cpu-memory", "1GB"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.verify", "--shape", opt, *limits, "--rows", *rows, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "verify-tiny-opt.json").read_text())
    assert [row["row"] for row in record["rows"]] == rows
    assert [row["sweeps"] for row in record["rows"]] == [4, 1]
    assert record["policy"]["cpu-memory"] == "1000000kB"
    for row in record["rows"]:
        assert row["is_within"]
        assert row["passes"] == 1
        assert row["ratio"] == pytest.approx((row["run_s"] + row["compare_s"]) / row["run_s"])
        assert row["worst"][0]["relative"] == max(stage["relative"] for stage in row["worst"])
        assert all(stage["weights"] is None for stage in row["worst"])
        assert f"ratio {row['ratio']:5.2f}" in done.stdout


class TestCommand:
    def test_runs_whole_without_helm(self, opt: str, tmp_path: Path) -> None:
        rows = ["1x3x0+8:4", "2x2x20+4:1"]
        flags = ["bench", "--shape", opt, "--rows", *rows, "--percent", "0", "100", "0", "100", "100", "0"]
        program = (
            "import sys; from flexgen_helm.run import main; code = main(sys.argv[1:]); "
            "sys.exit(code or 'helm' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *flags, "--out", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "bench-tiny-opt.json").read_text())
        assert [row["row"] for row in record["rows"]] == rows
        assert {"commit", "hardware", "policy", "plan", "rates"} <= set(record)
        for row, sweeps in zip(record["rows"], (4, 1), strict=True):
            assert row["sweeps"] == row["work"]["sweeps"] == sweeps
            assert row["limit_s"] == max(row["least_s"].values()) == row["least_s"][row["bound"]] > 0
            assert row["fraction"] == pytest.approx(row["limit_s"] / row["seconds"])
            assert row["requests_s"] == pytest.approx((3 if sweeps == 4 else 4) / row["seconds"])
            assert table_line(row) in done.stdout

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--shape", "opt-31b"], "opt-30b"),
            (["--rows", "100"], "RUNSxJOBS"),
            (["--curve", "0"], "at least 1"),
            (["--policy", "none-such"], "none-such"),
            (["--gpu-memory", "much"], "much"),
        ],
    )
    def test_bad_input_is_one_line(self, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
        from flexgen_helm.run import main

        assert main(["bench", *flags, "--out", "/dev/null/never"]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

    def test_a_workload_that_fails_is_recorded_and_told(
        self, opt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from flexgen_helm.run import main

        assert main(["bench", "--shape", opt, "--rows", "1x1x0+100:1", "1x1x0+8:1", "--out", str(tmp_path)]) == 1
        assert "window of 64" in capsys.readouterr().err
        rows = json.loads((tmp_path / "bench-tiny-opt.json").read_text())["rows"]
        assert "window of 64" in rows[0]["error"]
        assert rows[1]["seconds"] > 0

    def test_which_workloads_are_meant(self) -> None:
        assert list(map(str, workloads(None, None))) == list(ROWS)
        assert list(map(str, workloads(None, []))) == [f"1x{count}x0+512:32" for count in CURVE]
        assert list(map(str, workloads(["1x2x3+4:5"], [7]))) == ["1x2x3+4:5", "1x7x0+512:32"]

    def test_flags_lie_over_the_policy(self) -> None:
        policy = bench_policy("opt-30b-t4", "9GB", [1, 99, 0, 100, 100, 0])
        assert policy.weights == Share(gpu=1, cpu=99)
        assert policy.gpu_memory == 9_000_000_000
        assert policy.gpu_batch_size == Policy.load("opt-30b-t4").gpu_batch_size


def test_a_record_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    path = write_record("x", {"rows": [1.5]}, tmp_path / "new")
    record = json.loads(path.read_text())
    assert record["commit"] == "abc"
    assert record["rows"] == [1.5]
    assert record["hardware"]["torch"] == torch.__version__


def event(category: str, name: str, stream: int, start: float, duration: float, num_bytes: int = 0) -> dict[str, Any]:
    arguments = {"stream": stream} | ({"bytes": num_bytes} if num_bytes else {})
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": arguments}


TRACE = {
    "traceEvents": [
        event("kernel", "gemm", 7, 1200.0, 100.0),
        event("kernel", "norm", 7, 1310.0, 10.0),  # 10 us later: the same span
        event("kernel", "gemm", 7, 1400.0, 50.0),  # 80 us later: a gap
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 13, 1000.0, 150.0, 4 << 20),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 13, 1150.0, 150.0, 4 << 20),  # large: apart
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 14, 1290.0, 5.0, 100),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 14, 1300.0, 5.0, 200),  # small: one span
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 1460.0, 5.0, 100),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 5000.0},
        {"ph": "i", "cat": "kernel", "name": "mark", "ts": 0.0},
    ]
}


class TestTimeline:
    def test_neighbours_are_one_span(self) -> None:
        spans = timeline.spans_of(TRACE)
        assert [(s.kind, s.stream, s.start_us, s.duration_us, s.num_bytes, s.count) for s in spans] == [
            ("compute", 7, 200.0, 120.0, 0, 2),
            ("compute", 7, 400.0, 65.0, 0, 2),
            ("to device", 13, 0.0, 150.0, 4 << 20, 1),
            ("to device", 13, 150.0, 150.0, 4 << 20, 1),
            ("from device", 14, 290.0, 15.0, 300, 2),
        ]

    def test_gaps_are_told(self) -> None:
        told = timeline.summary(timeline.spans_of(TRACE))
        assert told["wall_ms"] == pytest.approx(0.465)
        assert told["to_device_ms"] == pytest.approx(0.3)
        assert told["compute_ms"] == pytest.approx(0.185)
        assert told["idle_ms"] == pytest.approx(0.08)  # 320 to 400
        assert told["copy_alone_ms"] == pytest.approx(0.2)  # 0 to 200
        assert told["compute_alone_ms"] == pytest.approx(0.08)  # 305 to 320, 400 to 465
        assert told["to_device_bytes"] == 8 << 20

    def test_an_empty_trace_has_no_spans(self) -> None:
        assert timeline.summary(timeline.spans_of({"traceEvents": []}))["wall_ms"] == 0

    def test_is_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        spans = timeline.spans_of(TRACE)
        record = {
            "shape": "opt-30b",
            "row": "1x1x0+1:1",
            "policy": {"gpu-memory": "16000000kB"},
            "seconds": 1.0,
            "summary": timeline.summary(spans),
            "columns": list(timeline.Span.__dataclass_fields__),
            "spans": [list(vars(span).values()) for span in spans],
        }
        draw.draw_timeline(record, tmp_path / "t.png", 0.0, None)
        assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


CURVE_RECORD = {
    "shape": "opt-30b",
    "policy": {"gpu-memory": "16000000kB"},
    "rows": [
        {"row": "1x64x0+512:32", "seconds": 20.0, "new_tokens_s": 102.4},
        {"row": "1x4x0+512:32", "seconds": 10.0, "new_tokens_s": 12.8},
        {"row": "1x256x0+512:32", "error": "no room"},
        {"row": "1x100x400+100:1", "seconds": 1.0, "new_tokens_s": 100.0},
    ],
}


def test_a_curve_has_the_rows_of_its_kind() -> None:
    assert draw.curve_points(CURVE_RECORD) == [(4, 10.0, 12.8), (64, 20.0, 102.4)]


def test_a_curve_of_rivals_has_a_line_for_each_contender() -> None:
    def record(count: int, seconds: float) -> dict[str, Any]:
        row = {"row": f"1x{count}x0+512:32", "seconds": seconds, "new_tokens_s": 32 * count / seconds}
        contenders = {
            "flexgen-helm": row,
            "accelerate --cut 2": {**row, "seconds": 9.0, "projected": True},
            "deepspeed": {"failed": "no"},
        }
        return {"shape": "opt-30b", "gpu_memory": "16GB", "contenders": contenders}

    found = draw.curves([record(64, 20.0), record(4, 10.0)])
    assert found["flexgen-helm, opt-30b, 16 GB"] == [(4, 10.0, 12.8), (64, 20.0, 102.4)]
    assert found["accelerate (projected from a part), opt-30b, 16 GB"] == [(4, 9.0, 12.8), (64, 9.0, 102.4)]
    assert len(found) == 2


def test_a_curve_joins_nothing_of_other_cards_or_policies() -> None:
    on_host = {**CURVE_RECORD, "policy": {"cpu-cache-compute": True, "gpu-memory": "16000000kB"}}
    elsewhere = {**CURVE_RECORD, "hardware": {"accelerators": ["H200"]}}
    assert list(draw.curves([CURVE_RECORD, on_host, elsewhere])) == [
        "flexgen-helm, opt-30b, 16 GB",
        "flexgen-helm, opt-30b, 16 GB, cpu-cache-compute True",
        "flexgen-helm, opt-30b, 16 GB, H200",
    ]


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw.draw_curve([CURVE_RECORD], tmp_path / "new" / "c.png")
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")


def look(resident: int, placed: int, device: int) -> dict[str, int]:
    names = ("resident_bytes", "placed_host_bytes", "torch_pinned_bytes", "device_reserved_bytes")
    return dict(zip(names, (resident, placed, 0, device), strict=True))


class TestMemory:
    BEFORE: ClassVar = look(10**9, 0, 0)
    EARLY: ClassVar = look(6 * 10**9, 5 * 10**9, 100)

    def test_nothing_grew(self) -> None:
        assert memory.verdicts(self.BEFORE, self.EARLY, self.EARLY, 100, 100) == []

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"device_reserved_bytes": 101}, "device_reserved_bytes grew from 100 to 101"),
            ({"torch_pinned_bytes": 1}, "torch_pinned_bytes grew"),
            ({"placed_host_bytes": 5 * 10**9 + 1}, "placed_host_bytes grew"),
            ({"resident_bytes": 6 * 10**9 + (65 << 20)}, "resident_bytes grew"),
        ],
    )
    def test_growth_is_told(self, change: dict[str, int], says: str) -> None:
        (found,) = memory.verdicts(self.BEFORE, self.EARLY, self.EARLY | change, 100, 101)
        assert says in found

    def test_limits_are_watched(self) -> None:
        assert "limit of 99" in memory.verdicts(self.BEFORE, self.EARLY, self.EARLY, 100, 99)[0]
        held = self.EARLY | {"resident_bytes": 6 * 10**9 + 25 * 10**7 + (65 << 20)}
        assert "5%" in memory.verdicts(self.BEFORE, held, held, 100, None)[0]


class TestRivals:
    def test_a_result_line_is_found_among_others(self, tmp_path: Path) -> None:
        lines = ["warm", contender.MARK + '{"seconds": 2.0}', "bye"]
        assert run.result_of(lines, tmp_path) == {"seconds": 2.0}
        assert run.result_of(["warm"], tmp_path) is None

    @pytest.mark.parametrize(
        ("program", "says"),
        [
            ("raise RuntimeError('no room')", "exit 1: RuntimeError: no room"),
            ("import os; os.abort()", "exit -6"),
            ("import time; print('on my way', flush=True); time.sleep(60)", "ended by the limit of 1 s"),
        ],
    )
    def test_a_failure_is_a_row(self, program: str, says: str, tmp_path: Path) -> None:
        result = run.run_contender([sys.executable, "-c", program], tmp_path, 1)
        assert says in result["failed"]
        assert says in run.table_line("x", result)

    @pytest.mark.parametrize("name", run.MODULES)
    def test_contenders_have_a_script(self, name: str, tmp_path: Path) -> None:
        options = argparse.Namespace(shape="opt-125m", row="1x2x0+4:2", gpu_memory="1GB")
        command = run.command_of(f"{name} --cut 2", options, tmp_path)
        assert command[-2:] == ["--cut", "2"]
        assert importlib.util.find_spec(command[command.index("-m") + 1]) is not None

    def test_continuous_batching_is_not_limited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["generate_batch", "--shape", "opt-125m", "--cut", "2"])
        with pytest.raises(SystemExit, match="leave out --cut"):
            generate_batch.main()

    def test_freetoken_reads_a_configuration_of_the_shape(self, tmp_path: Path) -> None:
        from transformers import AutoConfig

        freetoken.checkpoint_of("qwen3-30b-a3b", tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.architectures == ["Qwen3MoeForCausalLM"]
        assert (config.num_hidden_layers, config.num_experts, config.hidden_size) == (48, 128, 2048)

    def test_what_was_not_measured_is_said(self) -> None:
        result = {
            "seconds": 10.0,
            "new_tokens_s": 3.2,
            "device_reserved_bytes": 2 * 10**9,
            "projected": True,
            "batch_size": 8,
            "measured_batches": 1,
            "measured_tokens": 3,
        }
        assert "projected from 1 batches of 8, 3 tokens" in run.table_line("x", result)

    def test_projection_counts_every_batch_and_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.rivals import generating

        class Clock:
            """A model whose prefill takes 5 s and whose decode steps take 2 s, by the stopwatch's reckoning."""

            def generate(self, ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
                self.seconds = 5.0 + 2.0 * (max_new_tokens - 1)
                return torch.cat((ids, torch.zeros(len(ids), max_new_tokens, dtype=torch.long)), dim=1)

        model = Clock()

        def stopwatch(call: Any) -> float:
            call()
            return model.seconds

        monkeypatch.setattr(generating, "stopwatch", stopwatch)
        task = contender.Task(
            shape="opt-125m",
            load=Workload.parse("1x10x0+4:11"),
            gpu_memory=None,
            batch_size=None,
            cut=None,
            batches=None,
        )
        whole, detail = generating.time_generate(model, task, 5)
        assert (whole, detail["projected"]) == (2 * (5.0 + 20.0), False)
        part, detail = generating.time_generate(model, replace(task, cut=3, batches=1), 5)
        assert (part, detail["projected"], detail["measured_tokens"]) == (pytest.approx(whole), True, 4)

    def test_a_record_tells_of_a_shape_what_its_file_says(self, tmp_path: Path) -> None:
        changed = {"shape": "opt-30b", "num_hidden_layers": 8}
        file = tmp_path / "opt-30b-8-layers.json"
        file.write_text(json.dumps(changed))
        assert run.shape_of(str(file)) == {"shape": "opt-30b-8-layers", "changes": changed}
        assert run.shape_of("opt-6.7b") == {"shape": "opt-6.7b"}

    def test_published_figures_have_a_source(self) -> None:
        figures = json.loads((ROOT / "benchmarks" / "rivals" / "published.json").read_text())
        assert {"Petals", "FlexGen", "MoE-Gen", "KTransformers"} <= {figure["system"] for figure in figures}
        for figure in figures:
            assert figure.keys() - {"prompt_tokens_s"} == {"system", "work", "new_tokens_s", "per", "source"}
            assert figure["source"]
            assert figure["new_tokens_s"] > 0
            assert figure.get("prompt_tokens_s", 1) > 0


class TestDataWrangling:
    def test_requests_are_as_long_as_published_and_share_what_is_said(self) -> None:
        row = next(row for row in data_wrangling.ROWS if row.dataset == "Fodors-Zagats")
        assert row.workload(0.0, None) == Workload(1, 189, 0, 744, 3)
        assert row.workload(0.5, 4) == Workload(1, 4, 372, 372, 3)
        assert row.workload(0.46, 1000) == Workload(1, 189, 342, 402, 3)

    def test_published_rates_are_of_whole_batches_but_one(self) -> None:
        told = {
            (row.dataset, shape): published["requests"]
            for row in data_wrangling.ROWS
            for shape in row.published
            if (published := row.published_for(shape)) is not None
        }
        assert told["Beer", "opt-30b"] == 90.0  # of 91, in batches of 90
        assert told["Restaurant", "opt-30b"] == 80.0  # of 86, in batches of 80
        assert {key: count for key, count in told.items() if count != int(count)} == {
            ("DBLP-GoogleScholar", "opt-6.7b"): 210.7
        }
        assert len(told) == 20
        assert data_wrangling.ROWS[0].published_for("opt-125m") is None

    def test_runs_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shape = tmp_path / "wide-opt.json"
        shape.write_text(json.dumps(OPT | {"max_position_embeddings": 1024}))
        flags = [
            "--shape",
            str(shape),
            "--samples",
            "3",
            "--datasets",
            "Restaurant",
            "DBLP-ACM",
            "--out",
            str(tmp_path),
        ]
        monkeypatch.setattr(sys, "argv", ["data_wrangling", *flags, "--percent", "0", "100", "0", "100", "100", "0"])
        data_wrangling.main()
        record = json.loads((tmp_path / "data-wrangling-wide-opt.json").read_text())
        assert {"commit", "hardware", "policy", "plan", "rates", "shares"} <= set(record)
        dblp, restaurant = record["rows"][:2], record["rows"][2:]
        assert ["window of 1024" in row["error"] for row in dblp] == [True, True]
        assert [row["row"] for row in restaurant] == ["1x3x0+123:5", "1x3x56+67:5"]
        printed = capsys.readouterr().out
        for row in restaurant:
            assert row["tokens_s"] == pytest.approx(3 * (123 + 5) / row["seconds"])
            assert data_wrangling.table_line(row) in printed


def test_what_compression_costs_is_compared_token_by_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uncompressed row is the measure of the others; coarser codes move more, and take less."""
    model = models.save_model(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i} and {i * i}" for i in range(200)))
    arguments = ["--model", str(model), "--texts", str(text), "--count", "4", "--characters", "200", "--window", "60"]
    monkeypatch.setattr(sys, "argv", ["compression", *arguments, "--device", "cpu", "--out", str(tmp_path)])
    compression.main()
    record = json.loads((tmp_path / "compression.json").read_text())
    rows = record["settings"]
    assert record["tokens"] == 4 * (60 - 32)
    assert rows["as it is"]["mean_size_of_change"] == 0.0
    assert rows["as it is"]["hits_unchanged"] == 1.0
    for kind in ("weights", "cache", "both"):
        coarse, fine = rows[f"{kind} 4"], rows[f"{kind} 8"]
        assert coarse["mean_size_of_change"] > 4 * fine["mean_size_of_change"] > 0
        assert coarse["mean_logprob_change"] == pytest.approx(coarse["mean_logprob"] - rows["as it is"]["mean_logprob"])
    assert rows["both 4"]["weight_bytes"] < rows["both 8"]["weight_bytes"] < rows["cache 4"]["weight_bytes"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_codes_are_compared_at_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4.5 and 8.5 bits a number; 256 even levels leave a fifteenth of the error of 16 bent ones."""
    monkeypatch.setattr(sys, "argv", ["codecs", "--count", "64000", "--out", str(tmp_path)])
    codecs.main()
    rows = json.loads((tmp_path / "codecs.json").read_text())["codecs"]
    coarse, fine = rows["engine, 4 bits"], rows["engine, 8 bits"]
    assert (coarse["bits"], fine["bits"]) == (4.5, 8.5)
    assert fine["relative_error"] == pytest.approx(coarse["relative_error"] / 14.8, rel=0.1)


def test_experts_of_each_shape_agree_with_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "qwen3-30b-a3b": {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 8},
        "gpt-oss-120b": {"hidden_size": 32, "intermediate_size": 16, "num_local_experts": 8},
    }
    shapes = {name: dataclasses.replace(shape, config=tiny[name]) for name, shape in experts.SHAPES.items()}
    monkeypatch.setattr(experts, "SHAPES", shapes)
    rates = dict.fromkeys(("flop_s", "to_device_bytes_s", "from_device_bytes_s", "device_bytes_s"), 1e9)
    monkeypatch.setattr(experts, "measure_rates", lambda *_: Rates(**rates))
    monkeypatch.setattr(experts, "seconds_of", lambda call, device: float(len(call())))
    arguments = ["--device", "cpu", "--dtype", "float32", "--tokens", "9", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["experts", *arguments])
    experts.main()
    record = json.loads((tmp_path / "experts.json").read_text())
    assert record["differing"] == []
    row = record["shapes"]["qwen3-30b-a3b"][0]
    assert row["products_s"] == pytest.approx(2 * 9 * 8 * 3 * 32 * 16 / 1e9)
    assert row["matrices_s"] == pytest.approx(8 * 3 * 32 * 16 * 4 / 1e9)
    for name in ("ours", *experts.THEIRS):
        assert row[name]["fraction_of_limit"] == pytest.approx(max(row["products_s"], row["matrices_s"]) / 9)


def test_a_suites_requests_are_asked_in_one_call(opt: str) -> None:
    load = Workload.parse("3x4x20+5:1")
    with open_dummy(opt, Policy(device="cpu", gpu_batch_size=4, num_gpu_batches=1)) as engine:
        engine.wait_until_loaded()
        asked = sweep_suite.ask(engine, load)
    assert asked["sweeps"] == 3
    assert asked["prefill_rows"] == load.prefill_tokens
    assert asked["decode_rows"] == 0
    assert sorted(asked["run_ended_s"])[-1] <= asked["seconds"]
    assert asked["sweep_s"] + asked["host_s"] <= asked["seconds"]


def test_long_answers_end_where_they_are_told_to(opt: str) -> None:
    lengths = long_answers.long_tailed(5000, 500)
    assert lengths == long_answers.long_tailed(5000, 500)
    assert min(lengths) >= 1
    assert 0.012 < lengths.count(500) / 5000 < 0.024  # log-normal: 1.8 % are ten medians or more
    assert statistics.median(lengths) == pytest.approx(50, rel=0.1)
    prompts = long_answers.prompts_of(opt, 3, 10)
    found = long_answers.ours(opt, Policy(device="cpu"), prompts, [7, 2, 5])
    assert (found["sweeps"], found["most_sequences"]) == (7, 3)
    assert set(found["step_ms"]) == {"1", "2", "4"}  # of three sequences, of two and of one
    told = long_answers.batches(random_model(opt), prompts, [7, 2, 5], size=2, limit_s=0.0, cut=6)
    assert (told["batches"], told["measured_batches"], told["steps"], told["projected"]) == (2, 1, 7 + 5, True)
    assert told["measured_steps"] == 6


def test_what_must_cross_the_link_for_long_answers() -> None:
    """Two at once of prompts of 10: 3, 5 and 6 tokens take 7 sweeps at least, and read 10 + 11, 10 .. 13, 10 .. 14."""
    sizes = replace(SIZES, streamed_bytes=1000, cache_row_bytes=3, device_cache_row_bytes=4)
    seats = replace(plan().limits, sequences_per_batch=2, batches=1)
    read, kept = (10 + 11) + (10 + 11 + 12 + 13) + (10 + 11 + 12 + 13 + 14), 2 * (12 + 14 + 15) / 3
    for device, off in ((0, 1.0), (20 * 4, 1 - 20 / kept), (10**6, 0.0)):
        held = plan(device=device, limits=seats)
        least = long_answers.least_link_s([[1] * 10] * 3, [3, 5, 6], sizes, held, link=100.0)
        assert least == pytest.approx((7 * 1000 + off * read * 3) / 100)
    assert long_answers.least_link_s([[1] * 10] * 3, [3, 5, 6], sizes, held, 100.0, sweeps=9) == pytest.approx(90)


def test_a_mixtures_decode_sweeps_are_told_apart(moe: str) -> None:
    load = Workload.parse("1x4x0+20:5")
    policy = Policy(device="cpu", weights=Share(gpu=0, cpu=100), kv_cache=Share(gpu=0, cpu=100))
    rates = Rates(flop_s=1e30, to_device_bytes_s=1e3, from_device_bytes_s=1e30, device_bytes_s=1e30)
    with open_dummy(moe, policy) as engine:
        found = mixtures.measure(engine, load, rates)
        sizes = sizes_of(engine)
    # All prompts come in at once; then each step reads what is kept.
    assert [(each["prefill_rows"], each["decode_rows"]) for each in found["sweeps"]] == [(80, 0), *[(0, 4)] * 4]
    kept = 4 * sum(20 + step for step in range(4)) * sizes.cache_row_bytes
    assert found["decoding"]["link_s"] == pytest.approx((4 * sizes.streamed_bytes + kept) / 1e3)
    assert found["least_s"]["to device"] == pytest.approx((5 * sizes.streamed_bytes + kept) / 1e3)
    assert found["bound"] == "to device"


@pytest.mark.usefixtures("warm_processes")
def test_a_row_is_recorded_under_its_name_and_others_go_on(
    opt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    good = offloaded.Row(opt, "1GB", {"device": "cpu", "compress-cache": 4}, ("1x4x0+8:3",))
    bad = offloaded.Row(opt, "1GB", {"device": "cpu", "compress-cash": 4}, ("1x4x0+8:3",))
    monkeypatch.setattr(offloaded, "ROWS", {"bad": bad, "good": good})
    monkeypatch.setattr(sys, "argv", ["offloaded", "--out", str(tmp_path / "new")])
    offloaded.main()
    assert capfd.readouterr().out.splitlines()[-2:] == ["bad: exit code 2, no record", "good: done"]
    (file,) = (tmp_path / "new").iterdir()
    assert file.name == "bench-good.json"
    record = json.loads(file.read_text())
    assert record["policy"]["compress-cache"] == 4
    assert [row["row"] for row in record["rows"]] == ["1x4x0+8:3"]
    assert offloaded.run("good", good, 0.01, tmp_path) == "took longer than 0 s, no record"


def test_own_cost_is_what_helm_does_not_take() -> None:
    spans = {
        "runs cpu of all threads": 10.0,
        "adapt cpu": 2.0,
        "finish cpu": 3.0,
        "look up cpu": 2.5,
    }
    assert sweep_overhead.own_cost(spans) == 5.0


def test_spans_add_up_and_survive_errors() -> None:
    spans: dict[str, float] = {}

    def fail() -> None:
        raise ValueError

    for do in (sum, fail):
        timed = sweep_overhead.timed(spans, "it", do)
        with contextlib.suppress(ValueError):
            timed(range(1000)) if do is sum else timed()
    assert spans["it"] >= spans["it cpu"] > 0


@pytest.mark.slow
def test_several_devices_are_timed_beside_one(opt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here on the CPU; each way, with what it holds in host memory."""
    settings = ["--settings", "opt-30b-4bit", "--shape", opt, "--rows", "1x6x8+4:2"]
    several_gpus.main(["--devices", "cpu", "cpu", *settings, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "several-gpus.json").read_text())
    assert [(run["way"], len(run["devices"])) for run in record["runs"]] == [(None, 1), ("each", 2), ("gather", 2)]
    for found in record["runs"]:
        (row,) = found["rows"]
        assert row["seconds"] > 0
        assert len(row["each_s"]) == len(found["devices"])
        assert found["host_bytes_of_weights"] > 0
    assert capsys.readouterr().out.count("1x6x8+4:2") == 3


def test_workloads_that_share_sweeps_bring_the_weights_once() -> None:
    """By hand: 32 sweeps of 10 bytes of weights, 500 of keys and values, and the arithmetic of both."""
    parts = {"from_device_bytes": 1.0, "device_bytes": 2.0}
    long = Work(sweeps=32, flop=7.0, to_device_bytes=32 * 10 + 500, **parts)
    short = Work(sweeps=2, flop=90.0, to_device_bytes=2 * 10, **parts)
    expected = Work(sweeps=32, flop=97.0, to_device_bytes=820, from_device_bytes=2.0, device_bytes=4.0)
    assert together.together([long, short], 10) == expected


def test_a_cards_time_is_summed_by_what_its_kernels_do() -> None:
    events = [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", 2000.0),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::half_t>>", 500.0),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", 1000.0),
        ("void at::native::vectorized_elementwise_kernel<8, relu>", 250.0),
        ("Memcpy HtoD (Pinned -> Device)", 50.0),
    ]
    found = card_time.summed(events)
    expected = {"products": [3.0, 2], "attention": [0.5, 1], "between": [0.25, 1], "copies": [0.05, 1]}
    assert found["kinds_ms"] == expected
    assert next(iter(found["kernels_ms"])) == events[0][0]


def test_a_workloads_operations_are_counted_by_hand() -> None:
    asked = card_time.Asked.parse("2x3x4+5:1")
    assert asked.num_tokens == 2 * (4 + 3 * 5)
    assert asked.num_pairs == 2 * (1 + 2 + 3 + 4 + 3 * (5 + 6 + 7 + 8 + 9))
    jobs = asked.jobs(100, 0)
    assert [len(job.prompt) for job in jobs] == [9] * 6
    assert jobs[0].prompt[:4] == jobs[2].prompt[:4] != jobs[3].prompt[:4]
    suite = card_time.Asked.parse("suite").runs
    assert len(suite) == 20
    assert all(350 <= shared <= 1500 for shared, _ in suite)
    assert all(len(own) == 100 and min(own) >= 40 and max(own) <= 140 for _, own in suite)
    with pytest.raises(ConfigError, match="one new token"):
        card_time.Asked.parse("2x3x4+5:8")


def test_the_prompts_of_the_inspect_benchmark_are_those_of_mmlu(tmp_path: Path) -> None:
    for split, question in (("dev", "One?"), ("test", "Two?")):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        (tmp_path / "mmlu" / split / f"college_medicine_{split}.csv").write_text(f'{question},"a, b",c,d,e,B\n' * 3)
    found = inspect_mmlu.prompts_of(tmp_path, ["college_medicine"], instances=2, shots=1)
    choices = "\nA. a, b\nB. c\nC. d\nD. e\nAnswer:"
    told = "The following are multiple choice questions (with answers) about college medicine."
    assert found == [(f"{told}\n\nOne?{choices} B\n\nTwo?{choices}", "B")] * 2
    assert inspect_mmlu.agreement({"1": "A", "2": "B"}, {"1": "A", "2": "C"}) == 0.5
    with pytest.raises(SystemExit, match="other samples"):
        inspect_mmlu.agreement({"1": "A"}, {})
