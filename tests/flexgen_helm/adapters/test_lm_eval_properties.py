"""Protects: whatever lm-evaluation-harness asks, the answer is that of its own `hf` model, or a refusal by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install -e '.[lm-eval]'")

import tiny_models
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from engine.errors import ConfigError, UnsupportedError
from flexgen_helm.adapters.generation_settings import GenerationSettings
from flexgen_helm.adapters.lm_eval import FlexGenLM

GENERATION = {
    "eos_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.8,
    "top_k": 7,
    "repetition_penalty": 1.4,
    "suppress_tokens": [200, 201],
}
"""As a published checkpoint's generation_config.json has it."""
Pair = tuple[FlexGenLM, HFLM]
_AS_FOUND = (Phase.explicit, Phase.generate)  # a shorter example would take minutes to find
_few = settings(max_examples=2, deadline=None, derandomize=True, phases=_AS_FOUND)
_many = settings(max_examples=60, deadline=None, phases=_AS_FOUND)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.save_tiny_model(made, tiny_models.random_llama, adds_bos=True)
    (made / "generation_config.json").write_text(json.dumps(GENERATION))
    return made


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[tuple[FlexGenLM, HFLM]]:
    args = {"pretrained": str(directory), "max_length": 96}
    ours = FlexGenLM(policy={"device": "cpu", "gpu-batch-size": 5}, **args)
    yield ours, HFLM(device="cpu", dtype="float32", batch_size=1, **args)
    ours.engine.close()


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


_pieces = st.sampled_from(["What", " is", " the", "\n", " ", "é", "日本", "🙂", "</s>", "<pad>", "x = 1", "\t"])
_texts = st.lists(_pieces | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=40).map("".join)


_kwargs = st.fixed_dictionaries(
    {"until": st.lists(st.sampled_from(["\n", "e", "th", "</s>", "zz", "日"]), max_size=3)},
    optional={
        "max_gen_toks": st.integers(1, 16),
        "do_sample": st.just(False),
        "num_beams": st.just(1),
        "repetition_penalty": st.sampled_from([1.0, 2.0]),
        "no_repeat_ngram_size": st.sampled_from([0, 2]),
        "min_new_tokens": st.just(3),
    },
).map(lambda kwargs: {"max_gen_toks": 8, **kwargs})
"""Under the rules of generation_config.json, and those that the request gives itself."""


def continuations_score_as_with_hf(pair: Pair, pairs: list[tuple[str, str]]) -> None:
    ours, theirs = pair
    fit = [each for each in pairs if 1 < len(theirs.tok_encode(each[1], add_special_tokens=False)) < 90]
    requests = [request(*each) for each in fit if not each[0] or 0 < len(theirs._encode_pair(*each)[1]) <= 96]
    found, expected = (model.loglikelihood(requests, disable_tqdm=True) for model in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-4, rel=1e-6)


def texts_score_as_with_hf(pair: Pair, texts: list[str]) -> None:
    ours, theirs = pair
    requests = [request(each) for each in texts]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=5e-4, rel=1e-6)


def texts_are_continued_as_by_hf(pair: Pair, asked: list[tuple[str, Any]]) -> None:
    ours, theirs = pair
    requests = [request(*each) for each in asked]
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


PROPERTIES: dict[str, tuple[Callable[[Pair, Any], None], Any]] = {
    "continuations": (
        continuations_score_as_with_hf, st.lists(st.tuples(_texts, _texts.filter(bool)), min_size=4, max_size=12)
    ),
    "texts": (texts_score_as_with_hf, st.lists(_texts.filter(bool), min_size=2, max_size=5)),
    "generation": (
        texts_are_continued_as_by_hf, st.lists(st.tuples(_texts.filter(bool), _kwargs), min_size=4, max_size=8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("amount", [_few, pytest.param(_many, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", PROPERTIES)
def test_whatever_is_asked_the_answer_is_that_of_hf(name: str, amount: settings, pair: Pair) -> None:
    holds, asked = PROPERTIES[name]
    amount(given(asked)(lambda asked: holds(pair, asked)))()


@pytest.mark.parametrize("asked", [{}, {"top_k": 3}, {"top_p": 0.5, "top_k": 0}])
def test_sampling_is_cut_as_transformers_cuts_it(pair: Pair, asked: dict[str, Any]) -> None:
    ours, theirs = pair
    job = ours._generation("What", {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 0.7, **asked})
    settled, _ = theirs.model._prepare_generation_config(None, do_sample=True, temperature=0.7, **asked)
    assert (job.sampling.temperature, job.sampling.top_p) == (0.7, settled.top_p)
    assert job.sampling.top_k == (settled.top_k or None)


def test_without_a_generation_config_sampling_is_cut_by_transformers_own_defaults(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    assert GenerationSettings(tmp_path, None).sampled({}) == {"top_k": defaults["top_k"], "top_p": defaults["top_p"]}


def test_settings_that_are_not_carried_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"min_p": 0.1, "do_sample": True, "num_beams": 4}))
    odd = GenerationSettings(tmp_path, None)
    with pytest.raises(UnsupportedError, match=r"sets min_p 0\.1, which is not supported"):
        odd.sampled({})
    with pytest.raises(UnsupportedError, match=r"sets num_beams 4, which is not supported"):
        odd.applied(None, (1,), 1)  # type: ignore[arg-type]


def test_the_harness_by_itself_looks_for_no_models_of_others() -> None:
    """As docs/harnesses.md says: where this fails, an entry point would do what `flexgen-helm lm-eval` does."""
    code = (
        "import lm_eval.models; from lm_eval.api.registry import model_registry as r; print('hf' in r, 'flexgen' in r)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


REFUSED = {
    "peft": ("a", "name the adapter as pretrained"),
    "gguf_file": ("a.gguf", "name the file as pretrained"),
    "load_in_4bit": (True, "compress-weight: 4"),
    "max_memory_per_gpu": ("9GB", "give gpu_memory"),
    "parallelize": (True, "the policy places weights"),
    "trust_remote_code": (True, "code of a model's directory is never run"),
    "revision": ("v2", "is a path; leave revision out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_of_hf_are_told_what_says_the_same_here(name: str, directory: Path) -> None:
    value, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told):
        FlexGenLM(str(directory), policy={"device": "cpu"}, **{name: value})


def test_arguments_of_hf_that_ask_for_nothing_pass(directory: Path) -> None:
    nothing = {"parallelize": False, "trust_remote_code": False, "backend": "causal", "revision": "main", "peft": None}
    FlexGenLM(str(directory), policy={"device": "cpu"}, batch_size="auto:4", **nothing).engine.close()


def test_what_hf_fails_at_is_refused_before_anything_runs(pair: Pair) -> None:
    ours, theirs = pair
    hot = {"until": ["x"], "max_gen_toks": 4, "do_sample": True}
    with pytest.raises(ValueError, match="temperature"):
        theirs.generate_until([request("What", hot)], disable_tqdm=True)
    with pytest.raises(ConfigError, match="do_sample=True needs a temperature above 0"):
        ours.generate_until([request("What", hot)], disable_tqdm=True)


@pytest.mark.parametrize("stop", ["</think>", ">", "k>\n", "answer</think>"])
def test_a_stop_that_hides_the_end_of_thinking_is_refused(
    stop: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair
    monkeypatch.setattr(ours, "think_end_token", "</think>")
    with pytest.raises(ConfigError, match="overlaps think_end_token '</think>'"):
        ours._generation("What", {"until": ["\n\n", stop], "max_gen_toks": 4})
    ours._generation("What", {"until": ["\n\n", "<think>", "</s>"], "max_gen_toks": 4})
