"""Protects: inspect_ai's samples are answered and scored as by its own `hf` provider, on the same tiny model."""

from __future__ import annotations

import asyncio
import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed; tests/README.md says how to run these")

import tiny_models
from inspect_ai import Task, eval, eval_set
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentReasoning, GenerateConfig, Model, get_model
from inspect_ai.scorer import choice, exact, includes, match
from inspect_ai.solver import generate, multiple_choice, system_message
from inspect_ai.tool import ToolInfo, ToolParams
from inspect_ai.util import JSONSchema

import flexgen_helm.inspect_adapter  # noqa: F401 - the entry point of an installed package
from engine import Completion, Job
from engine.errors import ConfigError, EngineError, JobError
from engine.thinking import Tags, Thinking
from flexgen_helm.adapters.inspect_provider import FlexGenAPI

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if tools %}{{ tools }}{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)
GREEDY = GenerateConfig(temperature=0.0, logprobs=True, top_logprobs=1, max_connections=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rules in its generation_config.json, which the `hf` provider follows at any temperature."""
    made = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.save_tiny_model(made, tiny_models.random_llama, chat_template=TEMPLATE)
    file = made / "generation_config.json"
    rules = {"repetition_penalty": 1.3, "suppress_tokens": [200, 201], "top_p": 0.8, "top_k": 7, "temperature": 0.6}
    file.write_text(json.dumps({**json.loads(file.read_text()), **rules, "do_sample": True}))
    return made


@pytest.fixture(scope="module")
def ours(directory: Path) -> Iterator[Model]:
    model = get_model(f"flexgen/{directory}", config=GREEDY, policy={"device": "cpu"}, memoize=False)
    yield model
    model.api.close()


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Model:
    return get_model(f"hf/{directory}", config=GREEDY, device="cpu", do_sample=False, memoize=False)


@pytest.fixture(autouse=True)
def _streams_of_the_harness() -> Iterator[None]:
    """It leaves some open, which whoever collects them is told of."""
    yield
    with warnings.catch_warnings(action="ignore"):
        gc.collect()


def tasks() -> list[Task]:
    """Tasks of the kinds of MMLU, GSM8K, IFEval and GPQA, over local data."""
    letters = ["Paris", "Rome", "Berlin", "Madrid"]
    questions = [f"What is the capital of country number {number}?" for number in range(3)]
    many = [Sample(input=text, choices=letters, target="A") for text in questions]
    return [
        Task(MemoryDataset(many, name="mmlu"), solver=multiple_choice(), scorer=choice(), name="mmlu_like"),
        Task(
            MemoryDataset([Sample(input=f"{text} Think step by step.", target="4") for text in questions]),
            solver=[system_message("Examples.\n\n1 + 1?\nANSWER: 2"), generate(stop_seqs=["\n\n", "ra"])],
            scorer=match(numeric=True),
            name="gsm8k_like",
        ),
        Task(
            MemoryDataset([Sample(input=f"Write without commas: {text}", target="no") for text in questions]),
            solver=generate(),
            scorer=includes(),
            name="ifeval_like",
        ),
        Task(
            MemoryDataset(many[:2]),
            solver=multiple_choice(cot=True),
            scorer=exact(),
            epochs=2,
            name="gpqa_like",
        ),
    ]


def test_texts_logprobs_and_scores_are_those_of_hf(ours: Model, theirs: Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {"display": "none", "log_dir": str(tmp_path), "max_tokens": 20, "max_tasks": 4}
    found, expected = (eval(tasks(), model=model, **options) for model in (ours, theirs))
    for log, other in zip(found, expected, strict=True):
        assert log.status == other.status == "success", log.error
        assert log.samples is not None
        assert other.samples is not None
        key = lambda sample: (sample.id, sample.epoch)  # noqa: E731
        pairs = list(zip(sorted(log.samples, key=key), sorted(other.samples, key=key), strict=True))
        assert len(pairs) >= 3
        assert [sample.input for sample, _ in pairs] == [sample.input for _, sample in pairs]
        for sample, theirs_ in pairs:
            text, whole = sample.output.completion, theirs_.output.completion
            stops = ["\n\n", "ra"] if log.eval.task == "gsm8k_like" else []
            cuts = [at for stop in stops if (at := whole.find(stop)) >= 0]
            assert text == whole[: min(cuts, default=len(whole))]  # their text ends with the stop, ours before it
            ((score,), (other_score,)) = (each.output.choices for each in (sample, theirs_))
            assert score.logprobs is not None
            likeliest = [each.top_logprobs[0].logprob for each in score.logprobs.content]
            # Theirs tell the likeliest token's in place of the token's own, where rules have chosen another.
            assert likeliest == pytest.approx(
                [each.logprob for each in other_score.logprobs.content[: len(likeliest)]], abs=1e-4
            )
            for each in score.logprobs.content:
                top = each.top_logprobs[0]
                assert each.logprob == top.logprob if each.token == top.token else each.logprob <= top.logprob
        assert {name: s.value for name, s in (log.samples[0].scores or {}).items()} == {
            name: s.value for name, s in (other.samples[0].scores or {}).items()
        }


def test_samples_that_come_together_are_one_call_of_the_engine(
    ours: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a set of evaluations that is done is not asked again."""
    api: Any = ours.api
    calls: list[int] = []
    astream = api.engine.astream

    def counting(jobs: list[Job]) -> Any:
        calls.append(len(jobs))
        return astream(jobs)

    monkeypatch.setattr(api.engine, "astream", counting)
    data = MemoryDataset([Sample(input=f"question {number}", target="x") for number in range(12)])
    task = Task(data, solver=generate(), scorer=includes(), name="together")
    options: dict[str, Any] = {"display": "none", "log_dir": str(tmp_path / "logs"), "max_tokens": 3}
    for _ in range(2):
        done, logs = eval_set(task, model=ours, **options)
        assert done
        assert logs[0].status == "success"
    assert sum(calls) == 12
    assert len(calls) <= 3


def test_an_interrupted_set_goes_on_where_it_was(ours: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before the engine failed is not asked again, and in the end every sample is scored."""
    api: Any = ours.api
    asked: list[int] = []
    astream = api.engine.astream

    async def failing(jobs: list[Job]) -> Any:
        asked.append(len(jobs))
        async for index, done in astream(jobs):
            if index < 8:
                yield index, done
        for index in range(8, len(jobs)):
            yield index, Completion(error=EngineError("the machine went away"))

    data = MemoryDataset([Sample(id=number, input=f"question {number}", target="x") for number in range(12)])
    task = Task(data, solver=generate(), scorer=includes(), name="interrupted")
    options: dict[str, Any] = {"display": "none", "log_dir": str(tmp_path / "logs"), "max_tokens": 3}
    monkeypatch.setattr(api.engine, "astream", failing)
    done, _ = eval_set(task, model=ours, retry_attempts=0, **options)
    assert not done
    assert asked == [12]

    def counting(jobs: list[Job]) -> Any:
        asked.append(len(jobs))
        return astream(jobs)

    monkeypatch.setattr(api.engine, "astream", counting)
    done, logs = eval_set(task, model=ours, **options)
    assert done
    assert 4 <= sum(asked[1:]) < 12
    assert logs[0].results is not None
    assert logs[0].results.completed_samples == 12


def test_sampling_is_that_of_generate_where_nobody_says(ours: Model, theirs: Model) -> None:
    api: Any = ours.api
    expected, _ = theirs.api.model._prepare_generation_config(None, do_sample=True)  # type: ignore[attr-defined]
    (job,) = api._jobs([1, 2], "", GenerateConfig(), 4)
    found = job.sampling
    assert (found.temperature, found.top_k, found.top_p) == (expected.temperature, expected.top_k, expected.top_p)
    (job,) = api._jobs([1, 2], "", GenerateConfig(temperature=0.9, top_k=3, top_p=0.5, seed=4), 4)
    found = job.sampling
    assert (found.temperature, found.top_k, found.top_p, found.seed) == (0.9, 3, 0.5, 4)


def of(api: FlexGenAPI, text: str, tools: list[ToolInfo], rule: Thinking | None = None) -> Any:
    job, done = Job(prompt=[1], thinking=rule), Completion(text=text, finish_reason="endoftext")
    return api._choice(job, done, tools, GenerateConfig(), is_cut=False)


def test_thoughts_stand_apart_and_calls_of_tools_are_read(ours: Model) -> None:
    api: Any = ours.api
    parameters = ToolParams(properties={"x": JSONSchema(type="integer")}, required=["x"])
    add = ToolInfo(name="add", description="Adds.", parameters=parameters)
    found = of(api, '{"name": "add", "arguments": {"x": 1}}', [add])
    assert found.stop_reason == "tool_calls"
    (call,) = found.message.tool_calls
    assert (call.function, call.arguments) == ("add", {"x": 1})
    rule = Thinking(style=Tags(begin="<think>", end="</think>"))
    message = of(api, "<think> two </think>\n\nfour</s>", [], rule).message
    assert isinstance(message.content[0], ContentReasoning)
    assert (message.content[0].reasoning, message.text) == ("two", "four")
    asked = api.hf_chat([ChatMessageUser(content="hi")], [add])
    assert "Adds." in asked


def test_what_is_not_carried_out_is_refused(ours: Model, directory: Path) -> None:
    def ask(**settings: Any) -> Any:
        return asyncio.run(ours.api.generate([ChatMessageUser(content="hi")], [], "auto", GenerateConfig(**settings)))

    with pytest.raises(ConfigError, match="logit_bias"):
        ask(logit_bias={3: 1.0})
    with pytest.raises(JobError, match="top_logprobs 5"):
        ask(logprobs=True, top_logprobs=5, temperature=0.0)
    with pytest.raises(ConfigError, match="-M polcy: unknown argument; did you mean 'policy'"):
        get_model(f"flexgen/{directory}", polcy="auto", memoize=False)
    scored = ask(max_tokens=600, temperature=0.0, prompt_logprobs=1, num_choices=2, seed=1)
    assert [each.stop_reason for each in scored.choices] in (["stop"] * 2, ["model_length"] * 2)
    assert all(each.logprob <= 0 for each in scored.choices[0].prompt_logprobs.content)
    long = asyncio.run(ours.api.generate([ChatMessageUser(content="hi " * 600)], [], "auto", GenerateConfig()))
    assert long.choices[0].stop_reason == "model_length"
