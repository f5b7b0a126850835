"""Protects: `verify` finds nothing where there is nothing, and exactly the known difference where there is one."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CapacityError, EngineError
from engine.job import Completion, Job
from engine.planning.hardware import Memory
from engine.policy import Policy
from flexgen_helm.helm.scores import short_name
from flexgen_helm.run import main

GENERATION = "simple_mcqa"
LONGER = "synthetic_reasoning_natural:difficulty=easy"
JOINT = "mmlu:subject=anatomy,method=multiple_choice_joint"
SEPARATE = "commonsense:dataset=hellaswag,method=multiple_choice_separate_original"
LANGUAGE = "wikitext_103"
SAMPLED = "simple_classification:temperature=0.7"  # the temperature is not in the run's name

Verify = Callable[..., int]


@pytest.fixture
def cli(tmp_path: Path, helm_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verify]:
    """Run a command line in an empty directory, with HELM's data in a benchmark_output beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(helm_data / "scenarios", tmp_path / "data" / "scenarios")
    monkeypatch.chdir(folder)
    handler = logging.NullHandler()  # HELM's own would keep writing to this test's stdout
    logging.getLogger("helm").addHandler(handler)
    yield lambda *arguments: main([str(argument) for argument in arguments])
    logging.getLogger("helm").removeHandler(handler)


@pytest.fixture
def verify(cli: Verify) -> Verify:
    """Run `verify` on HELM's data."""
    return lambda *arguments: cli("verify", "-o", "../data", *arguments)


def runs(suite: str = "verify") -> dict[str, Path]:
    """The directories of a suite's runs, by their names without the model."""
    return {short_name(path.name): path for path in Path("../data/runs").joinpath(suite).glob("*model=*")}


def read(run: Path, file: str = "fidelity.json") -> Any:
    return json.loads((run / file).read_text())


def states(run: Path) -> list[Any]:
    found = read(run, "scenario_state.json")["request_states"]
    assert isinstance(found, list)
    return found


def tokens(run: Path) -> list[list[dict[str, Any]]]:
    """Of each request: its tokens as HELM keeps them, but the first of an echoed prompt, which has no probability."""
    return [
        state["result"]["completions"][0]["tokens"][1 if state["request"]["echo_prompt"] else 0 :]
        for state in states(run)
    ]


def stat(run: Path, name: str, split: str = "test") -> float:
    (found,) = [
        each
        for each in read(run, "stats.json")
        if (each["name"]["name"], each["name"].get("split")) == (name, split) and "perturbation" not in each["name"]
    ]
    return float(found["mean"])


def reference_from(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference load another checkpoint than our engine."""
    from flexgen_helm.fidelity.reference import Reference

    load = Reference.load
    monkeypatch.setattr(Reference, "load", lambda description, place: load(replace(description, path=str(path)), place))


@pytest.mark.parametrize(
    ("model_fixture", "entries"), [("tiny_llama", [LONGER, SEPARATE, SAMPLED]), ("tiny_opt", [JOINT, LANGUAGE])]
)
def test_an_exact_run_has_no_difference(
    request: pytest.FixtureRequest,
    model_fixture: str,
    entries: list[str],
    verify: Verify,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = request.getfixturevalue(model_fixture)
    assert verify("--model", model, "-r", *entries, "-m", 4, "--percent", 50, 50, 50, 50, 100, 0) == 0
    told = capsys.readouterr()
    assert "no chat template is applied to the prompts of" in told.err
    out = told.out.splitlines()
    assert out[-1].startswith("no drift")
    assert "0.0001 in float32" in out[-1]
    records = {name: read(run) for name, run in runs().items()}
    assert len(records) == len(entries)
    head = next(line for line in out if line.startswith(f"local/{model.name} "))
    columns = head.split()
    assert columns[1:5] == ["metric", "score", "reference", "difference"]
    for name, record in records.items():
        run = runs()[name]
        compared = tokens(run)
        generates = [not state["request"]["echo_prompt"] for state in states(run)]
        is_sampled = SAMPLED.startswith(name)
        assert record["verdict"] == "within rounding"
        assert record["logprobs"]["compared"] == sum(map(len, compared)) > 0
        assert 0 <= record["logprobs"]["mean_difference"] <= record["logprobs"]["largest_difference"] < 5e-5
        assert record["requests"] == {"compared": len(compared), "failed": 0, "failed_only_here": 0}
        assert record["sampled"] == is_sampled
        greedy = 0 if is_sampled else sum(generates)
        assert record["texts"] == {"identical": greedy, "compared": greedy, "differing_unexplained": 0}
        num_tokens = sum(map(len, compared)) if greedy else 0
        assert record["tokens"] == {"agreeing": num_tokens, "compared": num_tokens}
        score = record["score"]
        assert score["ours"] == stat(run, score["metric"], score["split"])
        if is_sampled:
            assert score["reference"] is score["difference"] is None
        else:
            assert score["reference"] == pytest.approx(score["ours"], rel=1e-5)
        (line,) = [line for line in out if line.startswith(f"{name} ")]
        cells = line.split()
        assert cells[1] == score["metric"]
        assert cells[2] == f"{score['ours']:.3f}"
        assert cells[3] == ("sampled" if is_sampled else f"{score['reference']:.3f}")
        assert cells[5] == f"{record['logprobs']['largest_difference']:.1e}"
        assert cells[7:] == [
            "sampled" if is_sampled else f"{num_tokens}/{num_tokens}" if greedy else "none",
            "sampled" if is_sampled else f"{greedy}/{greedy}" if greedy else "none",
            str(len(compared)),
            "0",
        ]
        assert 0 < len(record["worst"]) <= 5
        assert [each["difference"] for each in record["worst"]] == sorted(
            (abs(each["ours"] - each["reference"]) for each in record["worst"]), reverse=True
        )
        assert record["worst"][0]["difference"] == record["logprobs"]["largest_difference"]


def test_a_uniform_reference(
    verify: Verify,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a head of zeros, every token has probability 1/V, and the likeliest is the first: the end of the text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    shutil.copytree(tiny_llama, tmp_path / "uniform")
    model.save_pretrained(tmp_path / "uniform")
    reference_from(tmp_path / "uniform", monkeypatch)
    assert verify("--model", tiny_llama, "-r", GENERATION, LANGUAGE, "-m", 4) == 0
    entropy = math.log(model.config.vocab_size)

    language = runs()[LANGUAGE]
    record, ours = read(language), [[token["logprob"] for token in each] for each in tokens(language)]
    differences = [abs(logprob + entropy) for each in ours for logprob in each]
    assert record["verdict"] == "drift"
    assert record["logprobs"]["largest_difference"] == pytest.approx(max(differences), rel=1e-5)
    assert record["logprobs"]["mean_difference"] == pytest.approx(sum(differences) / len(differences), rel=1e-5)
    uniform = entropy / math.log(2) * stat(language, "num_perplexity_tokens") / stat(language, "num_bytes")
    assert record["score"]["metric"] == "bits_per_byte"
    assert record["score"]["reference"] == pytest.approx(uniform, rel=1e-5)
    assert record["score"]["difference"] == pytest.approx(stat(language, "bits_per_byte") - uniform, rel=1e-5)
    worst = max(range(len(ours)), key=lambda each: max(abs(logprob + entropy) for logprob in ours[each]))
    assert record["worst"][0]["instance_id"] == states(language)[worst]["instance"]["id"]
    position = record["worst"][0]["position"]
    assert record["worst"][0]["part"] == "prompt"
    assert record["worst"][0]["ours"] == ours[worst][position - 1]

    generation = runs()[GENERATION]
    record = read(generation)
    texts = [state["result"]["completions"][0]["text"] for state in states(generation)]
    assert record["texts"] == {"identical": texts.count(""), "compared": 4, "differing_unexplained": 0}
    assert record["tokens"] == {"agreeing": 0, "compared": sum(map(len, tokens(generation)))}
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in last[:2]] == [
        "drift in simple_mcqa",
        "drift in wikitext_103",
    ]
    assert f"bits_per_byte by {stat(language, 'bits_per_byte') - uniform:+.3f}" in last[1]


def test_a_reference_that_always_says_b(
    verify: Verify, tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last norm's weights zero, its bias is the hidden state everywhere, whatever the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_opt), AutoTokenizer.from_pretrained(tiny_opt)
    b = tokenizer.convert_tokens_to_ids("B")
    embedding, norm = model.get_input_embeddings().weight, model.model.decoder.final_layer_norm
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(embedding[b])
        logprobs = (embedding @ embedding[b]).log_softmax(-1)
    assert int(logprobs.argmax()) == b
    shutil.copytree(tiny_opt, tmp_path / "says-b")
    model.save_pretrained(tmp_path / "says-b")
    reference_from(tmp_path / "says-b", monkeypatch)
    assert verify("--model", tiny_opt, "-r", JOINT, "-m", 12) == 0
    run = runs()[JOINT]
    record = read(run)
    correct = [
        next(letter for letter, text in state["output_mapping"].items() if text == reference["output"]["text"])
        for state in states(run)
        if state["instance"]["split"] == record["score"]["split"]
        for reference in state["instance"]["references"]
        if "correct" in reference["tags"]
    ]
    expected = correct.count("B") / len(correct)
    assert 0 < expected < 1
    assert record["score"]["metric"] == "exact_match"
    assert record["score"]["reference"] == pytest.approx(expected)
    assert record["score"]["difference"] == pytest.approx(stat(run, "exact_match") - expected)
    texts = [each[0]["text"] if each else "" for each in tokens(run)]
    written = [tokenizer.decode([token]) for token in range(len(tokenizer))]  # some bytes are written alike
    differences = [
        abs(token["logprob"] - float(logprobs[each]))
        for token in (each[0] for each in tokens(run) if each)
        for each, text in enumerate(written)
        if text == token["text"] or (token["text"].startswith("bytes:") and "\ufffd" in text)
    ]
    assert record["logprobs"]["largest_difference"] in [pytest.approx(each, rel=1e-5) for each in differences]
    differing = sum(text != "B" for text in texts)
    assert record["texts"] == {"identical": 12 - differing, "compared": 12, "differing_unexplained": differing}
    assert record["tokens"] == {"agreeing": 12 - differing, "compared": 12}
    assert differing > 0


def test_answers_in_helms_cache_are_not_taken_and_a_failed_run_does_not_keep_others_from_being_compared(
    cli: Verify, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("-o", "../data", "--model", tiny_llama)
    assert cli("run", "-r", GENERATION, "-m", 2, *common) == 0
    before = {path: path.read_bytes() for path in runs("default")[GENERATION].iterdir()}
    capsys.readouterr()
    assert (
        cli("verify", "-r", GENERATION, "custom_mcqa:path=nowhere.jsonl,num_train_instances=0", "-m", 3, *common) == 1
    )
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("flexgen-helm: error: Failed runs: [")
    assert "3 requests, " in captured.out
    assert "from the cache" not in captured.out
    record = read(runs()[GENERATION])
    assert record["requests"] == {"compared": 3, "failed": 0, "failed_only_here": 0}
    assert record["run"] == runs()[GENERATION].name
    assert (record["model"], record["weights"], record["dtype"]) == ("local/tiny-llama", str(tiny_llama), "float32")
    assert record["policy"] == "auto"
    assert set(record["versions"]) == {"torch", "transformers", "crfm-helm", "flexgen-helm", "python"}
    assert [path.name for path in runs()[GENERATION].glob("*fidelity*")] == ["fidelity.json"]
    assert {path: path.read_bytes() for path in runs("default")[GENERATION].iterdir()} == before  # another suite


def test_what_is_left_out_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample, in a suite of its own: the default one may hold whole runs, which HELM would overwrite."""
    from flexgen_helm.commands.verify import parse_verify_flags

    args = parse_verify_flags(["-r", GENERATION])
    assert (args.max_eval_instances, args.suite) == (32, "verify")
    args = parse_verify_flags(["-r", GENERATION, "-m", "7", "--suite", "mine"])
    assert (args.max_eval_instances, args.suite) == (7, "mine")
    with pytest.raises(SystemExit):
        parse_verify_flags(["--help"])
    assert "drift" in capsys.readouterr().out


BAD: dict[str, tuple[list[str], str]] = {
    "unknown entry": (["-r", "synthetic_raesoning:mode=induction"], "did you mean synthetic_reasoning"),
    "no entry": ([], "-r or -c"),
    "no instances": (["-r", GENERATION, "-m", "0"], "-m 0"),
    "unknown policy": (["-r", GENERATION, "--policy", "opt-30b-t5"], "did you mean 'opt-30b-t4'"),
    "prompt longer than the pad": (["-r", GENERATION, "--pad-to-seq-len", "9"], "9"),
    "nothing to run": (["-r", GENERATION, "--dry-run"], "--dry-run"),
    "nothing run anew": (["-r", GENERATION, "--skip-completed-runs"], "--skip-completed-runs"),
    "missing model": (["-r", GENERATION, "--model", "/nowhere/at/all"], "does not exist"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str, cli: Verify, tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[case]
    code = cli("verify", "--model", tiny_llama, *arguments)
    refused(capfd, code, message)


def refused(capfd: pytest.CaptureFixture[str], code: int, message: str) -> None:
    (error,) = capfd.readouterr().err.splitlines()
    assert code == 2
    assert error.startswith("flexgen-helm: error: ")
    assert message in error
    assert not list(Path.cwd().iterdir())


@pytest.fixture
def _small_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No whole reference fits into host memory."""
    from flexgen_helm.fidelity import reference

    monkeypatch.setattr(reference, "available_memory", lambda *arguments: Memory(device=10_000, host=100_000, disk=0))


@pytest.mark.usefixtures("_small_host")
def test_a_model_larger_than_the_host_is_compared_layer_by_layer(
    verify: Verify, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says of answers what the whole reference says, and of each layer how far it is from stock attention."""
    entries = [LONGER, SEPARATE, SAMPLED]
    weights = ("--percent", 0, 0, 50, 50, 100, 0, "--offload-dir", tmp_path / "offload")
    assert verify("--model", tiny_llama, "-r", *entries, "-m", 4, *weights) == 0
    told = capsys.readouterr()
    out = told.out.splitlines()
    assert "will be compared layer by layer: its whole weights, 0.00 GB in float32, exceed the 0.00 GB" in told.err
    assert out[-1].startswith("no drift")
    assert out[-2].startswith(f"no layer of local/{tiny_llama.name} differs from stock sdpa attention")
    stages = ["embedding", *(f"layer {index}" for index in range(num_layers(tiny_llama))), "head"]
    lines = {line.split("  ")[0]: line.split() for line in out}
    for name in stages:
        assert float(lines[name][-6]) < 1e-3  # attention is so sharp here that rounding of its inputs counts tenfold
        assert float(lines[name][-5]) < 1e-5  # the mean
        assert float(lines[name][-2]) == 0  # the checkpoint's weights
        assert lines[name][-1] == "none"  # no codes
    for name, run in runs().items():
        record, compared = read(run), tokens(run)
        assert record["verdict"] == "within rounding"
        assert record["logprobs"]["compared"] == sum(map(len, compared)) > 0
        assert 0 <= record["logprobs"]["largest_difference"] < 5e-5
        assert record["requests"] == {"compared": len(compared), "failed": 0, "told_up_to_the_first_difference": 0}
        layers = record["layers"]
        assert [stage["name"] for stage in layers["stages"]] == stages
        assert all(stage["is_within"] and not stage["weights"]["is_wrong"] for stage in layers["stages"])
        assert layers["passes"] == 1
        assert layers["reason"].startswith("its whole weights")
        if not SAMPLED.startswith(name):
            assert record["score"]["reference"] == pytest.approx(record["score"]["ours"], rel=1e-5)
            agreeing = record["tokens"]
            assert agreeing["agreeing"] == agreeing["compared"]


def test_compression_layer_by_layer_is_compared_with_the_checkpoints_own_weights(
    verify: Verify, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexgen_helm.fidelity import reference

    # Two of the questions: to a third one the reference ends where it parts, so that its answer is told as a whole.
    command = ("--model", tiny_llama, "-r", LONGER, LANGUAGE, "-m", 2, "--compress-weight", 4)
    with monkeypatch.context() as patch:
        small = Memory(device=10_000, host=100_000, disk=0)
        patch.setattr(reference, "available_memory", lambda *arguments: small)
        assert verify(*command) == 0
    out = capsys.readouterr().out.splitlines()
    by_layer = {name: read(run) for name, run in runs().items()}
    assert any(line.startswith("With the same codes log-probabilities differ by up to ") for line in out)
    assert out[-1].startswith("more than the limits for rounding")
    assert any(line.startswith("no layer of") for line in out)
    assert verify(*command) == 0  # with the whole reference
    for name, run in runs().items():
        whole, layered = read(run), by_layer[name]
        assert whole["layers"] is None
        assert layered["layers"]["largest_logprob_difference_with_the_same_codes"] < 1e-4
        assert layered["verdict"] == whole["verdict"] == "drift"
        for key in ("largest_difference", "mean_difference"):
            assert layered["logprobs"][key] == pytest.approx(whole["logprobs"][key], abs=1e-4)
        assert layered["tokens"]["agreeing"] == whole["tokens"]["agreeing"]
        parted = whole["texts"]["compared"] - whole["texts"]["identical"]
        assert layered["requests"]["told_up_to_the_first_difference"] == parted
        assert layered["texts"] == whole["texts"]
        expected = None if parted else pytest.approx(whole["score"]["reference"], rel=1e-5)
        assert layered["score"]["reference"] == expected


@pytest.mark.usefixtures("_small_host")
def test_a_layer_at_fault_is_named(
    verify: Verify, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.model.attention.interface import BACKENDS

    for kind in {type(backend) for backend in BACKENDS}:
        for method in ("prefill", "decode"):
            compute = getattr(kind, method)
            monkeypatch.setattr(
                kind, method, lambda self, asked, compute=compute: compute(self, asked) * (1 + 0.1 * (asked.layer == 1))
            )
    assert verify("--model", tiny_llama, "-r", GENERATION, "-m", 2) == 0
    out = capsys.readouterr().out.splitlines()
    (line,) = [line for line in out if line.startswith("drift in layer ")]
    assert line.startswith(f"drift in layer 1 of local/{tiny_llama.name}: ")
    assert "differ from stock sdpa attention" in line
    record = read(runs()[GENERATION])
    assert record["verdict"] == "drift"
    assert record["layers"]["worst"] == "layer 1"
    assert [stage["name"] for stage in record["layers"]["stages"] if not stage["is_within"]] == ["layer 1"]


def num_layers(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


def test_a_quantized_checkpoint_that_transformers_cannot_run_is_compared_layer_by_layer(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from engine.checkpoint.description import describe
    from engine.errors import UnsupportedError
    from flexgen_helm.fidelity.reference import find_place

    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="cannot run it as a whole here: Loading an AWQ"):
        find_place(describe(str(model)), Policy(device="cpu"))


def test_where_the_reference_runs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is too small is left out; a half-width dtype takes half the memory."""
    from engine.checkpoint.description import describe
    from flexgen_helm.fidelity import reference
    from flexgen_helm.fidelity.reference import Place, find_place

    description = replace(describe(str(tiny_llama)), weight_bytes=1000)
    monkeypatch.setattr(reference, "resolve_device", lambda name: "cuda" if name == "auto" else name)
    memory = {"cuda": Memory(device=1200, host=999, disk=0), "cpu": Memory(device=999, host=999, disk=0)}
    monkeypatch.setattr(reference, "available_memory", lambda device, *limits: memory[device])
    with pytest.raises(CapacityError, match="in float32, exceed"):
        find_place(description, Policy(dtype="float32"))
    assert find_place(description, Policy(dtype="float16", device="cpu")) == Place("cpu", "float16")
    memory["cuda"] = Memory(device=1200, host=1000, disk=0)
    assert find_place(description, Policy()) == Place("cuda", "float32")
    memory["cuda"] = Memory(device=1100, host=1000, disk=0)
    assert find_place(description, Policy()) == Place("cpu", "float32")


def load_reference(path: Path) -> Any:
    from engine.checkpoint.description import describe
    from flexgen_helm.fidelity.reference import Place, Reference

    return Reference.load(describe(str(path)), Place("cpu", "float32"))


def test_the_reference_stops_as_documented(tiny_llama: Path) -> None:
    """Its text is that of an argmax loop up to the stop, and its tokens are as few as make that text."""
    import torch

    reference = load_reference(tiny_llama)
    model, tokenizer = reference._model, reference._tokenizer
    reasons = set()
    for start in range(2, 42, 8):
        prompt, said = [start, start + 7, start + 19], list[int]()
        with torch.inference_mode():
            while len(said) < 12 and tokenizer.eos_token_id not in said:
                said.append(int(model(torch.tensor([prompt + said])).logits[0, -1].argmax()))
        ended = "endoftext" if said[-1] == tokenizer.eos_token_id else "length"
        said = [token for token in said if token != tokenizer.eos_token_id]
        text = tokenizer.decode(said)
        middle = len(text) // 2
        later, earlier = text[middle + 1 : middle + 3], text[middle]
        cases: list[tuple[list[Any], str, str]] = [([], text, ended), (["not in it"], text, ended)]
        if len(said) > 4:
            before = next(n for n in range(len(said)) if said[n : n + 2] == said[2:4])
            cases += [
                ([earlier], text[: text.index(earlier)], "stop"),
                ([later, earlier], text[: min(text.index(later), text.index(earlier))], "stop"),
                ([said[2:4]], tokenizer.decode(said[:before]) if before else "", "stop"),
            ]
        for stop, expected, reason in cases:
            told = reference.greedy(Job(prompt=prompt, max_new_tokens=12, stop=stop))
            assert (told.text, told.finish_reason) == (expected, reason)
            assert list(told.tokens) == said[: len(told.tokens)]
            decoded = [tokenizer.decode(list(told.tokens[:n])) if n else "" for n in range(len(told.tokens) + 1)]
            assert [each.startswith(expected) for each in decoded] == [False] * len(told.tokens) + [True]
            reasons.add(reason)
    assert reasons == {"stop", "length", "endoftext"}


@pytest.mark.parametrize("prompt_logprobs", [True, False])
def test_the_reference_scores_up_to_the_end_of_the_window(tiny_opt: Path, prompt_logprobs: bool) -> None:
    """The last token that fits needs no position of its own, and OPT has none left for it."""
    import torch

    reference = load_reference(tiny_opt)
    ids = [(7 * place) % 590 + 2 for place in range(513)]
    with torch.inference_mode():
        logprobs = reference._model(torch.tensor([ids[:512]])).logits[0].log_softmax(-1)
    two = logprobs.topk(2).values
    for num_new in (8, 9):
        told = reference.force(Job(prompt=ids[:504], prompt_logprobs=prompt_logprobs), ids[504 : 504 + num_new])
        expected = [float(logprobs[place - 1, ids[place]]) for place in range(1, 504 + num_new)]
        assert told.logprobs == pytest.approx(expected[503:], abs=1e-5)
        assert told.margins == pytest.approx((two[503:, 0] - two[503:, 1]).tolist(), abs=1e-5)
        if prompt_logprobs:
            assert told.prompt_logprobs[0] is None
            assert told.prompt_logprobs[1:] == pytest.approx(expected[:503], abs=1e-5)
        else:
            assert told.prompt_logprobs is None


def test_a_reference_that_is_not_finite_is_no_oracle(tiny_llama: Path) -> None:
    import torch

    reference = load_reference(tiny_llama)
    with torch.no_grad():
        reference._model.lm_head.weight[5] = float("nan")
    with pytest.raises(EngineError, match="not finite in float32"):
        reference.force(Job(prompt=[3, 4]), [5])


def fidelity(dtype: str, *, ours: float = -1.0, reference: float = -1.0, margin: float = 0.0) -> Any:
    from flexgen_helm.fidelity.comparison import Compared, Comparison, Difference
    from flexgen_helm.fidelity.verdict import Fidelity
    from flexgen_helm.helm.scores import Score

    difference = Difference(
        instance_id="id1", train_trial_index=0, reference_index=None, part="completion", position=0,
        ours=ours, reference=reference,
    )  # fmt: skip
    compared = Compared(
        worst=difference, num_logprobs=1, sum_of_differences=difference.size, is_sampled=False,
        num_tokens=2, num_agreeing=1, same_text=margin == 0, margin=margin,
    )  # fmt: skip
    comparison = Comparison(compared=[compared], states=[], num_requests=1, num_failed=0, num_failed_here=0)
    score = Score("run", "m/m", "exact_match", "test", 1, 1.0)
    return Fidelity(comparison=comparison, score=score, reference_score=1.0, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "arguments", "has_drifted"),
    [
        ("float32", {"reference": -1.00009}, False),
        ("float32", {"reference": -0.99989}, True),
        ("float16", {"reference": -1.019}, False),
        ("bfloat16", {"reference": -1.021}, True),
        ("float32", {"margin": 1.9e-4}, False),  # each of two log-probabilities may be off by the tolerance
        ("float32", {"margin": 2.1e-4}, True),
    ],
)
def test_what_counts_as_drift(dtype: str, arguments: dict[str, float], has_drifted: bool) -> None:
    from flexgen_helm.fidelity.verdict import verdict

    found = fidelity(dtype, **arguments)
    assert found.has_drifted == has_drifted
    assert verdict([fidelity("float32"), found]).startswith("drift in run" if has_drifted else "no drift")


@pytest.mark.parametrize("fails_there", [False, True])
@pytest.mark.parametrize("asked", [{"max_tokens": 4}, {"max_tokens": 0, "echo_prompt": True}])
def test_a_failed_request_is_asked_of_the_reference(
    asked: dict[str, Any], fails_there: bool, tiny_llama: Path, make_client: Callable[..., Any]
) -> None:
    import torch
    from helm.benchmark.adaptation.request_state import RequestState
    from helm.benchmark.scenarios.scenario import Input, Instance
    from helm.common.request import Request, RequestResult

    from flexgen_helm.fidelity.comparison import compare
    from flexgen_helm.fidelity.verdict import verdict

    client, reference = make_client(policy={"device": "cpu"}), load_reference(tiny_llama)
    if fails_there:
        with torch.no_grad():
            reference._model.lm_head.weight[5] = float("nan")
    failed = RequestResult(success=False, embedding=[], completions=[], cached=False, error="not finite")
    request = Request(prompt="the capital of", temperature=0.0, **asked)
    state = RequestState(
        instance=Instance(Input(text="x"), [], id="id1"), reference_index=None, request_mode=None, train_trial_index=0,
        output_mapping=None, request=request, result=failed, num_train_instances=0, prompt_truncated=False,
    )  # fmt: skip
    comparison = compare([state], lambda job: Completion(), client._translator, reference)
    assert (comparison.num_requests, comparison.num_failed) == (0, 1)
    found = replace(fidelity("float32"), comparison=comparison)
    figures = found.figures()
    if fails_there:
        assert comparison.states == [state]
        assert figures["verdict"] == "nothing compared"
        assert verdict([found]).startswith("nothing to compare")
        assert "1 requests failed here and count as empty answers" in verdict([found])
    else:
        assert figures["requests"] == {"compared": 0, "failed": 1, "failed_only_here": 1}
        assert figures["verdict"] == "drift"
        assert "1 requests, which fail here only" in verdict([found])
        (told,) = comparison.states
        answer, expected = told.result.completions[0], client.make_request(request).completions[0]
        assert (answer.text, [token.text for token in answer.tokens]) == (
            expected.text,
            [token.text for token in expected.tokens],
        )
        assert answer.logprob == pytest.approx(expected.logprob, abs=1e-4)
