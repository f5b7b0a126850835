"""Protects: completions sampled by a whole engine follow the distribution that plain `transformers` computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from engine import Completion, Engine, Job, Sampling

NUM_DRAWS = 2000
VOCABULARY = ["<s>", "<pad>", "</s>", *"abcdefghijk"]
END = 2
PROMPT = [0, 5, 9, 4]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 14 tokens, some of them a hundred times as likely as others."""
    directory = models.save_model(tmp_path_factory.mktemp("small"), "llama", vocab_size=len(VOCABULARY))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] *= 3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    for file in directory.glob("tokenizer*"):
        file.unlink()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine(small: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(small), policy={"device": "cpu"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(small: Path) -> PreTrainedModel:
    return models.load_reference(small)


def logits_after(plain: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return plain(torch.tensor([tokens])).logits[0, -1].double().numpy()


def distribution(logits: np.ndarray, sampling: Sampling, generated: list[int]) -> np.ndarray:
    """Probabilities `[vocabulary]` of the next token: penalties, temperature, top-k, top-p, in this order."""
    logits = logits.copy()
    for token in set(generated):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * generated.count(token)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-weights)
    weights[order[sampling.top_k or len(order) :]] = 0.0
    weights /= weights.sum()
    size = int(np.searchsorted(weights[order].cumsum(), sampling.top_p)) + 1
    weights[order[size:]] = 0.0
    return weights / weights.sum()


def draw(engine: Engine, sampling: Sampling, max_new_tokens: int) -> list[Completion]:
    """One completion for each of the first seeds."""
    samplings = [
        Sampling(
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=seed,
            presence_penalty=sampling.presence_penalty, frequency_penalty=sampling.frequency_penalty,
        )
        for seed in range(NUM_DRAWS)
    ]  # fmt: skip
    return engine.run([Job(prompt=PROMPT, max_new_tokens=max_new_tokens, sampling=each) for each in samplings])


def drawn(completion: Completion) -> tuple[int, ...]:
    """Tokens that were drawn, the end included."""
    return (*completion.tokens, END) if completion.finish_reason == "endoftext" else completion.tokens


def assert_drawn_from(found: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    """Chi-square test, p > 0.001, of counts against probabilities; outcomes expected less than five times are one."""
    assert set(found) <= {outcome for outcome, probability in expected.items() if probability > 0}
    common = [outcome for outcome, probability in expected.items() if probability * NUM_DRAWS >= 5]
    counts = [found[outcome] for outcome in common]
    means = [expected[outcome] * NUM_DRAWS for outcome in common]
    if NUM_DRAWS - sum(means) >= 5:
        counts.append(NUM_DRAWS - sum(counts))
        means.append(NUM_DRAWS - sum(means))
    else:  # too rare to be tested; then the others must sum up
        means = [mean * sum(counts) / sum(means) for mean in means]
    assert len(counts) >= 2
    assert stats.chisquare(counts, means).pvalue > 0.001


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=2.0, top_k=4),
        Sampling(temperature=1.5, top_p=0.8),
    ],
    ids=lambda sampling: f"temperature {sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}",
)
def test_first_tokens_are_drawn_from_the_models_distribution(
    engine: Engine, plain: PreTrainedModel, sampling: Sampling
) -> None:
    completions = draw(engine, sampling, 1)
    expected = distribution(logits_after(plain, PROMPT), sampling, [])
    found = Counter(drawn(completion) for completion in completions)
    assert_drawn_from(found, {(token,): float(each) for token, each in enumerate(expected)})
    logprobs = torch.tensor(logits_after(plain, PROMPT)).log_softmax(-1)
    for completion in completions[:50]:  # of the model itself, whatever it was drawn from
        assert list(completion.logprobs) == pytest.approx(logprobs[list(completion.tokens)].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.5, presence_penalty=2.0),
        Sampling(temperature=2.0, presence_penalty=-1.0, frequency_penalty=-1.0, top_p=0.8),
    ],
    ids=lambda sampling: f"presence {sampling.presence_penalty}, frequency {sampling.frequency_penalty}",
)
def test_pairs_of_tokens_are_drawn_from_the_joint_distribution(
    engine: Engine, plain: PreTrainedModel, sampling: Sampling
) -> None:
    """Second draws are independent of the first, and penalties look at what was generated, not at the prompt."""
    expected: dict[tuple[int, ...], float] = {}
    for first, probability in enumerate(distribution(logits_after(plain, PROMPT), sampling, [])):
        if first == END:
            expected[END,] = float(probability)
            continue
        following = distribution(logits_after(plain, [*PROMPT, first]), sampling, [first])
        expected |= {(first, token): float(probability * each) for token, each in enumerate(following)}
    assert_drawn_from(Counter(drawn(completion) for completion in draw(engine, sampling, 2)), expected)
