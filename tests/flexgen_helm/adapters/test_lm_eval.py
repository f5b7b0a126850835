"""Protects: lm-evaluation-harness's answers and scores are those of its own `hf` backend, on the same tiny models."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install -e '.[lm-eval]'")

import tiny_models
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from engine.errors import CheckpointError, ConfigError, JobError
from engine.job import Completion, Job
from flexgen_helm.adapters.lm_eval import FlexGenLM
from flexgen_helm.run import main

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
WORDS = [
    "What",
    " is",
    " the",
    " capital",
    " of",
    " France?",
    "\n",
    "Paris",
    " é",
    "日本",
    " 🙂",
    " def",
    " random",
    "(x)",
]
Pair = tuple[FlexGenLM, HFLM]


def request(*args: Any) -> Any:
    """What the harness hands to a model, as far as models look at it."""
    return SimpleNamespace(args=args)


def text(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    llama, opt = tiny_models.random_llama, tiny_models.random_opt
    return {
        "llama": tiny_models.save_tiny_model(folder / "llama", llama, chat_template=CHAT),
        "opt": tiny_models.save_tiny_model(folder / "opt", opt, adds_bos=True),
        "pieces": tiny_models.save_tiny_model(
            folder / "pieces", llama, train=tiny_models.train_sentencepiece, loud=("<0x0A>", "</s>"), adds_bos=True
        ),
    }


@pytest.fixture(scope="module")
def make(directories: dict[str, Path]) -> Iterator[Callable[..., Pair]]:
    """Ours and the harness's own model, for the same arguments; each made once."""
    made: dict[tuple[str, str], Pair] = {}

    def of(name: str, **args: Any) -> Pair:
        key = name, repr(args)
        if key not in made:
            args["pretrained"] = str(directories[name])
            ours = FlexGenLM(policy={"device": "cpu", "gpu-batch-size": 5}, **args)
            made[key] = ours, HFLM(device="cpu", dtype="float32", batch_size=1, **args)
        return made[key]

    yield of
    for ours, _ in made.values():
        ours.engine.close()


def assert_same_scores(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4, rel=1e-6)


CASES = [
    ("llama", {}),
    ("opt", {}),
    ("pieces", {}),
    ("llama", {"max_length": 40}),
    ("pieces", {"add_bos_token": False, "max_length": 64}),
    ("llama", {"add_bos_token": True, "prefix_token_id": 5}),
]


@pytest.mark.parametrize(("name", "args"), CASES)
def test_continuations_score_as_those_of_hf(name: str, args: dict[str, Any], make: Callable[..., Pair]) -> None:
    """Empty contexts, contexts beyond the window, spaces at the border, repeats, greedy continuations."""
    ours, theirs = make(name, **args)
    rng = random.Random(1)
    few_shot = text(rng, 30)
    pairs = [(few_shot + text(rng, rng.randrange(3)), " " + text(rng, 1 + i % 3)) for i in range(12)]
    pairs += [("", "Paris"), ("", "日本 🙂"), ("A ", " b"), ("trailing  ", "é"), (few_shot, " is"), (few_shot, " is")]
    pairs += [(text(rng, 400), text(rng, 3)), ("</s> spelled out", " is"), ("", "</s> what")]
    requests = [request(*pair) for pair in pairs if ours.tok_encode(pair[1])]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert_same_scores(ours.loglikelihood(requests, disable_tqdm=True), expected)


@pytest.mark.parametrize(("name", "args"), CASES)
def test_a_continuation_is_greedy_where_hf_says_so(name: str, args: dict[str, Any], make: Callable[..., Pair]) -> None:
    """What the model itself would write, the same with another end, and with another beginning."""
    ours, theirs = make(name, **args)
    rng = random.Random(5)
    requests = []
    for size in (1, 5, 12, 400):
        context = ours.tok_encode(text(rng, size))
        room = context[-(theirs.max_length - 4) :]
        written = theirs._model_generate(
            torch.tensor([room]), len(room) + 4, stop=[], attention_mask=torch.ones(1, len(room)), eos_token_id=[-1]
        )[0, len(room) :].tolist()
        other = [7 if token != 7 else 8 for token in written]
        for continuation in (written, [*written[:-1], other[-1]], [other[0], *written[1:]], written[:1], other[:1]):
            requests.append((("", ""), room, continuation))
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_same_scores(ours._loglikelihood_tokens(requests, disable_tqdm=True), expected)
    assert [greedy for _, greedy in expected] == [True, False, False, True, False] * 4


@pytest.mark.parametrize(("name", "args"), CASES)
def test_whole_texts_score_as_those_of_hf(name: str, args: dict[str, Any], make: Callable[..., Pair]) -> None:
    """Shorter than the window, exactly as long, and several windows long."""
    ours, theirs = make(name, **args)
    rng = random.Random(2)
    long = text(rng, 900)
    ids = ours.tok_encode(long)
    exact = [ours.tokenizer.decode(ids[: ours.max_length + i], skip_special_tokens=True) for i in (-1, 0, 1)]
    requests = [request(each) for each in (long, *exact, "x", text(rng, 20), long)]
    assert len(ids) > 2 * ours.max_length or ours.max_length > 100
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize(("name", "args"), CASES)
def test_generated_texts_are_those_of_hf(name: str, args: dict[str, Any], make: Callable[..., Pair]) -> None:
    ours, theirs = make(name, **args)
    rng = random.Random(3)
    kwargs: list[dict[str, Any]] = [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": "e", "max_new_tokens": 16, "do_sample": False, "temperature": 0.7},
        {"until": [], "max_gen_toks": 20, "temperature": 0.0, "num_beams": 1},
        {"until": ["\n\n", "th", "an", "zz"], "max_gen_toks": 30, "do_sample": False},
    ]
    contexts = [text(rng, 1 + 5 * i) for i in range(8)] + [text(rng, 500), "</s> spelled out", "<s>spelled out"]
    requests = [request(context, each) for context in contexts for each in kwargs]
    expected = theirs.generate_until(requests, disable_tqdm=True)
    found = ours.generate_until(requests, disable_tqdm=True)
    if name == "pieces":  # HFLM looks for stops in the last few tokens, and half a character there may hide a line end
        expected = [each for each in expected if "\ufffd" not in each]
        found = [each for each in found if "\ufffd" not in each]
    assert found == expected
    assert len(set(map(len, expected))) > 3


def test_a_stop_may_begin_inside_a_token(make: Callable[..., Pair]) -> None:
    ours, theirs = make("llama")
    rng = random.Random(6)
    requests = []
    for context in [text(rng, 2 + i) for i in range(6)]:
        [done] = ours.engine.run([Job(prompt=ours.tok_encode(context), max_new_tokens=20)])
        pieces = [ours.tokenizer.decode([token]) for token in done.tokens]
        stops = [left[-1] + right[0] for left, right in pairwise(pieces) if len(left) > 1 and (left + right).isascii()]
        requests += [request(context, {"until": [stop], "max_gen_toks": 20}) for stop in stops]
    assert len(requests) > 10
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_answers_are_kept_as_they_come(make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an evaluation that was interrupted goes on from there."""
    ours, _ = make("llama")
    kept: dict[Any, Any] = {}
    hook = SimpleNamespace(add_partial=lambda kind, args, answer: kept.update({(kind, args[0]): answer}))
    monkeypatch.setattr(ours, "cache_hook", hook)
    [score] = ours.loglikelihood([request("What", " is")], disable_tqdm=True)
    [written] = ours.generate_until([request("What", {"until": [], "max_gen_toks": 3})], disable_tqdm=True)
    long = text(random.Random(7), 700)  # of several windows
    wholes = ours.loglikelihood_rolling([request("What"), request(long)], disable_tqdm=True)
    rolling = {("loglikelihood_rolling", "What"): wholes[0], ("loglikelihood_rolling", long): wholes[1]}
    assert kept == {("loglikelihood", "What"): score, ("generate_until", "What"): written, **rolling}


def test_repeats_draw_samples_of_their_own_and_all_run_in_one_call(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = make("llama")
    calls: list[list[Job]] = []
    stream = ours.engine.stream
    monkeypatch.setattr(ours.engine, "stream", lambda jobs: calls.append(jobs) or stream(jobs))  # type: ignore[func-returns-value]
    greedy, drawn = {"until": ["\n"]}, {"until": ["\n"], "temperature": 1.0, "top_p": 0.9, "top_k": 0}
    requests = [request("What", each) for each in (greedy, drawn, greedy, drawn)]
    random.seed(1)
    first = ours.generate_until(requests, disable_tqdm=True)
    assert first[0] == first[2]
    [jobs] = calls
    assert [(job.sampling.temperature, job.sampling.top_p, job.sampling.top_k) for job in jobs] == [
        (0.0, 1.0, None), (1.0, 0.9, None), (0.0, 1.0, None), (1.0, 0.9, None)
    ]  # fmt: skip
    assert jobs[1].sampling.seed != jobs[3].sampling.seed
    assert {job.max_new_tokens for job in jobs} == {256}  # the harness's default
    random.seed(1)
    assert ours.generate_until(requests, disable_tqdm=True) == first


def test_thoughts_are_cut_off_as_hf_does(make: Callable[..., Pair]) -> None:
    ours, theirs = make("llama", think_end_token="e")
    requests = [request(f"What {i}", {"until": [], "max_gen_toks": 20}) for i in range(6)]
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_stop_inside_a_special_token_takes_nothing_of_the_answer(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is special in the tokenizer's files only, as some chat models' ends of turns are."""
    from tokenizers import AddedToken

    path = shutil.copytree(directories["llama"], tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("The answer is 42")["input_ids"]
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save_pretrained(path)
    ours = FlexGenLM(str(path), policy={"device": "cpu"})
    theirs = HFLM(str(path), device="cpu", batch_size=1)
    end = ours.tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [*ids, end]
    monkeypatch.setattr(theirs, "_model_generate", lambda context, **_: torch.tensor([[*context[0].tolist(), *said]]))
    for stop, text in (("|", "The answer is 42<"), ("end", "The answer is 42<|im_"), ("42", "The answer is ")):
        tokens = tuple(said) if stop != "42" else tuple(ids)
        done = Completion(text=text, tokens=tokens, finish_reason="stop")
        monkeypatch.setattr(ours.engine, "stream", lambda jobs, done=done: [(0, done)])
        asked = [request("What", {"until": [stop], "max_gen_toks": 20})]
        assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)
    ours.engine.close()


@pytest.mark.parametrize("as_text", [False, True])
def test_thoughts_end_at_a_token_given_by_its_id_as_with_hf(make: Callable[..., Pair], as_text: bool) -> None:
    plain, _ = make("llama")
    contexts = [f"What {i}" for i in range(6)]
    jobs = [Job(prompt=plain.tok_encode(context), max_new_tokens=20) for context in contexts]
    frequent = Counter(token for done in plain.engine.run(jobs) for token in done.tokens).most_common(1)[0][0]
    ours, theirs = make("llama", think_end_token=str(frequent) if as_text else frequent)
    requests = [request(context, {"until": [], "max_gen_toks": 20}) for context in contexts]
    found = ours.generate_until(requests, disable_tqdm=True)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert found != plain.generate_until(requests, disable_tqdm=True)


def test_the_template_is_told_whether_to_think_as_hf_tells_it(directories: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(directories["llama"], tmp_path / "llama")
    (path / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}{{ style }}"
    )
    chat = [{"role": "user", "content": "Hi"}]
    for args in ({"enable_thinking": True}, {"enable_thinking": False}, {"chat_template_args": {"style": "terse"}}):
        args = {"think_end_token": "</think>", **args}
        ours, theirs = FlexGenLM(str(path), policy={"device": "cpu"}, **args), HFLM(str(path), device="cpu", **args)
        assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
        ours.engine.close()
    assert "terse" in ours.apply_chat_template(chat)
    with pytest.raises(ConfigError, match="enable_thinking needs think_end_token"):
        FlexGenLM(str(path), enable_thinking=True)
    thinking = FlexGenLM(str(path), policy={"device": "cpu"}, enable_thinking=True, think_end_token="</think>")
    with pytest.raises(ConfigError, match="is for tasks that generate"):
        thinking.loglikelihood([request("a", "b")])
    thinking.engine.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_harnesses_device_is_the_cpu_where_there_is_no_gpu(directories: dict[str, Path]) -> None:
    path = str(directories["llama"])
    ours, theirs = FlexGenLM(path, device="cuda:0"), HFLM(path, device="cuda:0")
    assert str(theirs.device) == ours.engine.policy.device == "cpu"
    ours.engine.close()


@pytest.mark.parametrize("argument", ["stop", "stop_sequences"])
def test_a_generation_argument_of_others_is_told_its_name_here(make: Callable[..., Pair], argument: str) -> None:
    ours, _ = make("llama")
    with pytest.raises(ConfigError, match="not supported; did you mean 'until'"):
        ours.generate_until([request("What", {"until": [], argument: ["x"], "max_gen_toks": 4})])


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 10},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks with local data."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(4)
    docs = [
        {
            "question": text(rng, 6),
            "choices": [text(rng, 1 + i) for i in range(4)],
            "answer": i % 4,
            "text": text(rng, 90),
        }
        for i in range(10)
    ]
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "docs.json")}, "cache_dir": str(folder / "cache")}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    return folder


CHATTED = {
    "apply_chat_template": True,
    "fewshot_as_multiturn": True,
    "system_instruction": "Answer with one letter.",
    "gen_kwargs": {"max_gen_toks": 6, "repetition_penalty": 1.3},
    "limit": 9,
}
"""What the harness's flags of these names give to `simple_evaluate`."""


def evaluate(model: Any, tasks: Path, **args: Any) -> tuple[dict[str, Any], list[Any]]:
    """Metrics by task, and every answer."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **args)
    assert found is not None
    answers = [sample["resps"] for name in TASKS for sample in found["samples"][name]]
    return {name: found["results"][name] for name in TASKS}, answers


def flat(value: Any) -> list[Any]:
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(("name", "args"), [("llama", {}), ("opt", {}), ("llama", CHATTED)])
def test_an_evaluation_gives_what_hf_gives(
    name: str, args: dict[str, Any], make: Callable[..., Pair], tasks: Path
) -> None:
    ours, theirs = make(name)
    (metrics, answers), (expected_metrics, expected) = (evaluate(model, tasks, **args) for model in (ours, theirs))
    for task, values in metrics.items():
        assert values.keys() == expected_metrics[task].keys()
        for metric, value in values.items():
            wanted = expected_metrics[task][metric]
            assert value == (pytest.approx(wanted, rel=1e-5) if isinstance(wanted, float) else wanted)
    assert len(flat(answers)) == len(flat(expected)) > 80
    for found, wanted in zip(flat(answers), flat(expected), strict=True):
        assert found == (pytest.approx(wanted, abs=1e-4, rel=1e-6) if isinstance(wanted, float) else wanted)


def test_the_harness_keeps_requests_and_answers(
    make: Callable[..., Pair], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = make("llama")
    assert ours.tokenizer_name == theirs.tokenizer_name
    cache = str(tmp_path / "answers")
    first = evaluate(ours, tasks, use_cache=cache)
    monkeypatch.setattr(ours.engine, "stream", None)  # nothing runs any more
    assert evaluate(ours, tasks, use_cache=cache) == first


def test_the_command_line(
    directories: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    make: Callable[..., Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # 15000 files
    monkeypatch.setattr(sys, "argv", [])
    model_args = f"pretrained={directories['llama']},policy=all-on-cpu,dtype=float32"
    arguments = ["lm-eval", "--model", "flexgen", "--model_args", model_args, "--tasks", "writing", "--device", "cpu"]
    assert main([*arguments, "--include_path", str(tasks), "--output_path", str(tmp_path)]) == 0
    [results] = tmp_path.glob("**/results*.json")
    found = json.loads(results.read_text())
    assert found["config"]["model"] == "flexgen"
    made = found["config"]["flexgen"]
    assert made["policy"]["dtype"] == "float32"
    assert len(made["identity"]["weights"]) == 64
    assert made["versions"]["torch"] == version("torch")
    assert made["hardware"]["cores"] >= 1
    expected, _ = evaluate(make("llama")[1], tasks)
    assert found["results"]["writing"]["exact_match,none"] == expected["writing"]["exact_match,none"]


@pytest.mark.slow
def test_the_command_line_on_a_cluster(
    directories: dict[str, Path], tasks: Path, tmp_path: Path, make: Callable[..., Pair]
) -> None:
    model_args = f"pretrained={directories['llama']},policy=all-on-cpu,dtype=float32"
    program = [sys.executable, "-m", "flexgen_helm", "lm-eval", "--ray", "local", "--workers", "2"]
    asked = ["--model", "flexgen", "--model_args", model_args, "--tasks", ",".join(TASKS), "--device", "cpu"]
    told = ["--include_path", str(tasks), "--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run([*program, *asked, *told], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = tmp_path.glob("**/results*.json")
    found = json.loads(results.read_text())["results"]
    expected, _ = evaluate(make("llama")[1], tasks)
    for name, values in expected.items():
        for metric, wanted in values.items():
            if isinstance(wanted, float) and "stderr" not in metric:  # which the command draws samples for
                assert found[name][metric] == pytest.approx(wanted, rel=1e-5), (name, metric)


def test_what_the_harness_raises_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", [])
    assert main(["lm-eval", "--model", "flexgen", "--model_args", "pretrained=x", "--tasks", "no such task"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("flexgen-helm: error: lm-evaluation-harness failed: ValueError: Tasks not")


def test_the_command_line_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tasks: Path
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", [])
    arguments = ["lm-eval", "--model", "flexgen", "--model_args", "pretraind=x", "--tasks", "writing"]
    assert main([*arguments, "--include_path", str(tasks)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "flexgen-helm: error: model_args: unknown argument 'pretraind'; did you mean 'pretrained'?"
    )


def test_bad_arguments_are_refused_by_name(directories: dict[str, Path], make: Callable[..., Pair]) -> None:
    path = str(directories["llama"])
    with pytest.raises(ConfigError, match="unknown argument 'polcy'; did you mean 'policy'"):
        FlexGenLM(path, polcy="auto")
    with pytest.raises(ConfigError, match="pretrained="):
        FlexGenLM(batch_size=1)
    with pytest.raises(ConfigError, match="dtype"):
        FlexGenLM(path, dtype="float33")
    with pytest.raises(ConfigError, match="max_length 9999 is not within the model's window of 512"):
        FlexGenLM(path, max_length=9999)
    ours, _ = make("llama", max_length=40)
    with pytest.raises(ConfigError, match=r"'What'.* max_gen_toks 40 leave no room in 40"):
        ours.generate_until([request("What", {"until": [], "max_gen_toks": 40})])
    with pytest.raises(ConfigError, match=r"top_kk=3: not supported; did you mean 'top_k'"):
        ours.generate_until([request("What", {"until": [], "top_kk": 3, "max_gen_toks": 4})])


def test_memory_limits_override_the_policys(directories: dict[str, Path], make: Callable[..., Pair]) -> None:
    limits = {"gpu_memory": "300MB", "cpu_memory": 1}  # the harness makes a number of what looks like one
    ours = FlexGenLM(pretrained=str(directories["llama"]), policy={"gpu-memory": "200MB"}, device="cpu", **limits)
    assert (ours.engine.policy.gpu_memory, ours.engine.policy.cpu_memory) == (300 * 10**6, 2**30)
    ours.engine.close()


def test_a_request_that_cannot_be_served_is_named(make: Callable[..., Pair]) -> None:
    ours, _ = make("llama", max_length=40)
    with pytest.raises(JobError, match=r"'What' \+ '…yyy.*.*; each part needs one, the last may have 40"):
        ours.loglikelihood([request("is", " it"), request("What", "yyy zzz " * 50)], disable_tqdm=True)
    with pytest.raises(JobError, match="request '': the prompt is empty"):
        ours.generate_until([request("", {"until": [], "max_gen_toks": 4})], disable_tqdm=True)


def test_without_the_harness_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "--model", "flexgen"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("run `pip install 'flexgen-helm[lm-eval]'`")


def test_texts_far_beyond_the_window_and_endless_templates_are_told_beforehand(make: Callable[..., Pair]) -> None:
    ours, _ = make("llama")
    with pytest.raises(JobError, match=r"101,000 characters, more than 100,000, which the model's window of"):
        ours.generate_until([request("x" * 101_000, {"until": ["."]})], disable_tqdm=True)
    with pytest.raises(JobError, match=r"101,001 characters"):
        ours.loglikelihood([request("x" * 101_000, "y")], disable_tqdm=True)
    before = ours.tokenizer.chat_template
    ours.__dict__.pop("_template_ends", None)
    loop = "{% for a in range(99999) %}"
    ours.tokenizer.chat_template = f"{loop}{loop}{{% endfor %}}{{% endfor %}}"
    try:
        with pytest.raises(CheckpointError, match="does not end"):
            ours.apply_chat_template([{"role": "user", "content": "a"}])
    finally:
        ours.tokenizer.chat_template = before
