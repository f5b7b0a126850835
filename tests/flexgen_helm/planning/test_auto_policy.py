"""Protects: `auto` places weights for the requests at hand, as the search has them, and leaves alone what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine.errors import ConfigError
from engine.job import Job, Sampling
from engine.model.causal_model import CausalModel
from engine.planning.hardware import Memory
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.sharing import Resources, Sharing
from engine.policy import Policy, Share, WeightCodes
from flexgen_helm.helm import engines
from flexgen_helm.planning import auto_policy
from flexgen_helm.planning.auto_policy import Chosen, choose, workload_of
from flexgen_helm.planning.dummy import shape_model, write_model_directory
from flexgen_helm.planning.estimate import Estimate
from flexgen_helm.planning.policy_search import best_of, search
from flexgen_helm.planning.roofline import Workload

GB = 10**9
MEMORY = Memory(device=16 * GB, host=110 * GB, disk=0)


@settings(max_examples=40, deadline=None)
@given(
    runs=st.integers(1, 4),
    jobs=st.integers(2, 9),
    shared=st.integers(40, 90),
    own=st.integers(2, 20),
    new=st.integers(1, 9),
)
def test_jobs_of_a_workload_are_that_workload(runs: int, jobs: int, shared: int, own: int, new: int) -> None:
    load = Workload(runs, jobs, shared, own, new)
    assert workload_of(load.jobs(50_000)) == load
    assert workload_of(Workload(1, jobs, 0, 30, new).jobs(50_000)) == Workload(1, jobs, 0, 30, new)


def test_means_of_unlike_jobs() -> None:
    """Bad ones do not count; those that only score compute all but their last token, and generate none."""
    jobs = [
        Job(prompt=[1] * 10, max_new_tokens=4),
        Job(prompt=[2] * 21, max_new_tokens=0, prompt_logprobs=True),
        Job(prompt=[3] * 9, max_new_tokens=-1),
        Job(prompt=[3] * 9, max_new_tokens=99, sampling=Sampling(temperature=-1)),
    ]
    assert workload_of(jobs) == Workload(1, 2, 0, 15, 2)
    assert workload_of(jobs[2:]) is None
    assert workload_of([]) is None


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opt-30b")
    write_model_directory("opt-30b", folder)
    return folder


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    """A machine with the profiled card."""
    profile = HardwareProfile.load("h100-16gb")
    monkeypatch.setattr(auto_policy, "resolve_device", lambda name: "cuda")
    monkeypatch.setattr(auto_policy, "available_memory", lambda *_: MEMORY)
    monkeypatch.setattr(auto_policy.HardwareProfile, "load", lambda: profile)
    return profile


def test_attention_is_not_left_to_the_host_for_some_requests_only(opt: Path, card: HardwareProfile) -> None:
    """Which requests come together must not change the bits of their answers."""
    base = Policy(gpu_memory=16 * GB, batch_invariant=True)
    chosen = choose(str(opt), "float16", base, Workload.parse("1x80x0+512:32").jobs(50_000))
    assert chosen.policy.weights is not None
    assert not chosen.policy.cpu_cache_compute


@pytest.mark.parametrize("work", ["1x100x400+100:1", "1x80x0+512:32"])
def test_the_best_of_the_search(work: str, opt: Path, card: HardwareProfile, tmp_path: Path) -> None:
    load, base = Workload.parse(work), Policy(gpu_memory=16 * GB)
    chosen = choose(str(opt), "float16", base, load.jobs(50_000))
    found = search(shape_model("opt-30b", "float16", tmp_path), card, MEMORY, load, base, compress=False)
    plain = next(each for each in found if not each.policy.cpu_cache_compute)
    best = found[0] if found[0].seconds <= 0.9 * plain.seconds else plain
    alike = [each for each in found if each.policy.cpu_cache_compute is best.policy.cpu_cache_compute]
    alike = [each for each in alike if each.seconds <= 1.05 * best.seconds]
    (taken,) = [each for each in alike if each.policy == chosen.policy]
    assert taken.plan.limits.rows_per_batch == max(each.plan.limits.rows_per_batch for each in alike)
    assert chosen.policy.weights is not None
    assert replace(chosen.policy, weights=None, cpu_cache_compute=False) == base
    assert chosen.policy.cpu_cache_compute == (":32" in work)
    assert "% of the weights on the device" in chosen.note
    assert f"for {load.num_requests} requests" in chosen.note
    assert ("attention on the host" in chosen.note.split(";")[0]) == (":32" in work)


def test_lossless_weights_are_planned_where_the_link_holds_work_back_and_only_taken_when_asked_for(
    card: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their bytes: 12.1 of 16 bits; and not for prompts that keep the card busy, nor of float16."""
    write_model_directory("llama-3-8b", tmp_path)
    base, memory = Policy(gpu_memory=6 * GB, cpu_memory=100 * GB), replace(MEMORY, device=6 * GB)
    linked, busy = (Workload.parse(work) for work in ("1x8x0+100:40", "9x100x400+400:1"))

    def planned(dtype: str, load: Workload) -> WeightCodes:
        model = CausalModel(tmp_path, getattr(torch, dtype), torch.device("cpu"))
        return best_of(search(model, card, memory, load, base, compress=False, lossless=True)).policy.compress_weight

    assert planned("bfloat16", linked) == "lossless"
    assert planned("bfloat16", busy) is planned("float16", linked) is None
    monkeypatch.setattr(auto_policy, "available_memory", lambda *_: memory)
    monkeypatch.setattr(auto_policy, "resolve_dtype", lambda name, dtype, device: dtype)  # which would ask the card
    taken = [
        choose(str(tmp_path), dtype, replace(base, compress_weight=codes), linked.jobs(50_000))
        for dtype, codes in (("bfloat16", None), ("bfloat16", "lossless"), ("float16", "lossless"))
    ]
    assert [each.policy.compress_weight for each in taken] == [None, "lossless", "lossless"]
    assert [each.estimate is None for each in taken] == [False, False, True]


def test_what_is_said_stays(opt: Path, card: HardwareProfile) -> None:
    jobs = Workload.parse("1x9x0+50:1").jobs(50_000)
    for said in (Policy(weights=Share(gpu=1, cpu=99)), Policy(kv_cache=Share(gpu=0, cpu=100))):
        assert choose(str(opt), "float16", said, jobs).policy is said
    assert choose(str(opt), "float16", Policy(), []).policy == Policy()
    coded = choose(str(opt), "float16", Policy(compress_weight=4), jobs).policy
    assert (coded.compress_weight, coded.compress_cache) == (4, None)
    assert coded.weights is not None


@pytest.mark.parametrize(("gather_bytes_s", "gather"), [(400e9, True), (4e9, False)])
def test_several_cards_are_placed_for_as_they_share_the_weights(
    gather_bytes_s: float,
    gather: bool,
    opt: Path,
    card: HardwareProfile,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Two cards over links of 40 GB/s each: a link from card to card that is slower than those does not pay."""
    profile = replace(card, links_together_bytes_s=40e9, gather_bytes_s=gather_bytes_s)
    monkeypatch.setattr(auto_policy.HardwareProfile, "load", lambda: profile)
    found = Resources(memory=MEMORY, sharing=Sharing(count=2, gather=True))
    load, base = Workload.parse("2x100x400+100:1"), Policy(gpu_memory=16 * GB)
    chosen = choose(str(opt), "float16", base, load.jobs(50_000), lambda policy: found)
    assert chosen.policy.gather_weights is gather
    assert chosen.policy.weights is not None
    assert chosen.estimate is not None
    model = shape_model("opt-30b", "float16", tmp_path)
    (same,) = [
        each
        for each in search(model, profile, MEMORY, load, base, compress=False, sharing=Sharing(count=2, gather=gather))
        if each.policy == replace(chosen.policy, gather_weights=None)
    ]
    assert chosen.estimate.seconds == same.seconds
    assert ("which gather them" in chosen.note) is gather
    assert "on each of 2 devices" in chosen.note

    placed = Policy(gpu_memory=16 * GB, weights=Share(gpu=0, cpu=100))
    assert choose(str(opt), "float16", placed, load.jobs(50_000), lambda policy: found) == Chosen(
        replace(placed, gather_weights=gather), None, ""
    )
    said = replace(placed, gather_weights=not gather)
    assert choose(str(opt), "float16", said, load.jobs(50_000), lambda policy: found).policy is said


def test_where_nothing_is_known(opt: Path, card: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> HardwareProfile:
        raise ConfigError("there is no hardware profile of this machine; run `flexgen-helm doctor --profile`")

    jobs = Workload.parse("1x9x0+50:1").jobs(50_000)
    monkeypatch.setattr(auto_policy.HardwareProfile, "load", nothing)
    chosen = choose(str(opt), "float16", Policy(), jobs)
    assert chosen.policy == Policy()
    assert chosen.estimate is None
    assert "placed by rule" in chosen.note
    assert "doctor --profile" in chosen.note
    monkeypatch.setattr(auto_policy, "resolve_device", lambda name: "cpu")
    assert choose(str(opt), "float16", Policy(), jobs).note == ""


def test_what_fits_nowhere_is_left_to_the_engine(
    opt: Path, card: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_policy, "available_memory", lambda *_: Memory(device=GB, host=GB, disk=0))
    chosen = choose(str(opt), "float16", Policy(), Workload.parse("1x9x0+50:1").jobs(50_000))
    assert (chosen.policy, chosen.estimate) == (Policy(), None)


def test_the_engine_is_loaded_with_it_and_the_end_is_compared(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: later jobs are not those that the estimate is of."""
    chosen = Policy(weights=Share(gpu=7, cpu=93))
    estimate = SimpleNamespace(seconds=0.5)
    monkeypatch.setattr(engines, "choose", lambda *_: Chosen(chosen, cast(Estimate, estimate), "auto: a note"))
    loaded: list[Policy] = []

    def load(path: str, policy: Policy, window: int | None) -> FakeEngine:
        loaded.append(policy)
        return FakeEngine(AutoTokenizer.from_pretrained(path))

    served, lines = engines.EngineRegistry(load).served(str(tiny_llama), Policy()), list[str]()
    monkeypatch.setattr(engines, "hlog", lines.append)
    for _ in range(2):
        assert len(list(served.stream([Job(prompt=[20], max_new_tokens=2)]))) == 1
    assert loaded == [chosen]
    assert lines[0] == "auto: a note"
    assert len(lines) == 2
    assert "1 requests took" in lines[1]
    assert "at least 0.5 s" in lines[1]
    assert served.policy == Policy()
    served.forget()  # its weight files are open
