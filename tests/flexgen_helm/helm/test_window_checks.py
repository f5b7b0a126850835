"""Protects: prompts are counted and cut to the window as HELM's own window services and tokenizers do it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.adapters.adapter_factory import AdapterFactory
from helm.benchmark.adaptation.common_adapter_specs import (
    get_generation_adapter_spec,
    get_language_modeling_adapter_spec,
    get_multiple_choice_adapter_spec,
)
from helm.benchmark.model_deployment_registry import (
    ALL_MODEL_DEPLOYMENTS,
    DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT,
    ClientSpec,
    ModelDeployment,
    WindowServiceSpec,
    register_model_deployment,
)
from helm.benchmark.model_metadata_registry import (
    ALL_MODELS_METADATA,
    MODEL_NAME_TO_MODEL_METADATA,
    ModelMetadata,
    register_model_metadata,
)
from helm.benchmark.scenarios.scenario import CORRECT_TAG, Input, Instance, Output, Reference
from helm.benchmark.tokenizer_config_registry import (
    ALL_TOKENIZER_CONFIGS,
    TOKENIZER_NAME_TO_CONFIG,
    TokenizerConfig,
    TokenizerSpec,
    register_tokenizer_config,
)
from helm.benchmark.window_services.tokenizer_service import TokenizerService
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig
from helm.common.local_context import LocalContext
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from tiny_models import train_sentencepiece, train_tokenizer

from flexgen_helm.helm.requests.known_tokens import KnownTokens
from flexgen_helm.helm.window_checks import adapted

SERVICES = "helm.benchmark.window_services"
TEXTS = ["", " ", "plain English text here", " two  spaces ", "naïve café", "日本語の文です", "hi 🙂🙂", "a\n\tb</s>c",
         "The following are questions (with answers). " * 9]  # fmt: skip
WINDOW = 40


@pytest.fixture(params=["bytes", "pieces", "pieces with a beginning"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A tokenizer's directory."""
    path = tmp_path / "tokenizer"
    train = train_tokenizer if request.param == "bytes" else train_sentencepiece
    train(tmp_path, adds_bos="beginning" in request.param).save_pretrained(path)
    yield path
    HuggingFaceTokenizer._tokenizers.pop("local/counted", None)


@pytest.fixture(
    params=[
        "default_window_service.DefaultWindowService",
        "no_decoding_window_service.NoDecodingWindowService",
        "encoder_decoder_window_service.EncoderDecoderWindowService",
    ]
)
def deployment(request: pytest.FixtureRequest, tokenizer: Path) -> Iterator[str]:
    """One that HELM counts tokens of by one of its window services."""
    registries: list[Any] = [ALL_MODEL_DEPLOYMENTS, DEPLOYMENT_NAME_TO_MODEL_DEPLOYMENT, ALL_MODELS_METADATA]
    registries += [MODEL_NAME_TO_MODEL_METADATA, ALL_TOKENIZER_CONFIGS, TOKENIZER_NAME_TO_CONFIG]
    before = [each.copy() for each in registries]
    args = {"pretrained_model_name_or_path": str(tokenizer), "trust_remote_code": False}
    spec = TokenizerSpec("helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer", args)
    register_tokenizer_config(TokenizerConfig("local/counted", spec, "</s>", "</s>"))
    register_model_metadata(ModelMetadata("local/counted", "local", "x", "x", "open", None))
    register_model_deployment(
        ModelDeployment(
            name="x/counted", client_spec=ClientSpec("helm.clients.simple_client.SimpleClient", {}),
            model_name="local/counted", tokenizer_name="local/counted", max_sequence_length=WINDOW,
            window_service_spec=WindowServiceSpec(f"{SERVICES}.{request.param}", {}),
        )
    )  # fmt: skip
    yield "x/counted"
    for each, kept in zip(registries, before, strict=True):
        each.clear()
        each.extend(kept) if isinstance(each, list) else each.update(kept)


def service(tmp_path: Path, *, known: bool) -> tuple[TokenizerService, KnownTokens]:
    """HELM's own, or with our tokenizers in its place."""
    context = LocalContext(str(tmp_path / f"env{known}"), BlackHoleCacheBackendConfig())
    ours = KnownTokens({}, BlackHoleCacheBackendConfig())
    if known:
        context.tokenizer = ours
    return TokenizerService(context), ours


def answers(window: Any, text: str) -> dict[str, Any]:
    """What a window service says of a text, errors included."""
    found: dict[str, Any] = {}
    for method in ("get_num_tokens", "encode", "tokenize", "fits_within_context_window", "truncate_from_right"):
        lengths = [(), (WINDOW - 3,), (WINDOW,)] if "w" in method or "trunc" in method else [()]
        for length in lengths:
            try:
                answer = getattr(window, method)(text, *length)
                found[f"{method}{length}"] = [t.value for t in answer.tokens] if method == "encode" else answer
            except Exception as error:
                found[f"{method}{length}"] = type(error)
    return found


def test_every_window_service_says_what_it_says_of_helms_own_tokenizer(deployment: str, tmp_path: Path) -> None:
    helms, _ = service(tmp_path, known=False)
    ours, known = service(tmp_path, known=True)
    window = WindowServiceFactory.get_window_service(deployment, ours)
    expected = {text: answers(WindowServiceFactory.get_window_service(deployment, helms), text) for text in TEXTS}
    assert {text: answers(window, text) for text in TEXTS} == expected  # one by one
    known.forget()
    known.encode("local/counted", TEXTS)
    assert {text: answers(window, text) for text in TEXTS} == expected  # together
    numbers = known.numbers("local/counted", TEXTS)
    assert len(numbers) == len(TEXTS)
    known.forget()
    known.count("local/counted", numbers)
    assert {text: answers(window, text) for text in TEXTS} == expected  # in another process


def instances(length: int) -> list[Instance]:
    """Questions with answers; the texts of those that are asked become longer and longer."""
    found = []
    for number in range(9):
        split = "train" if number < 5 else "test"
        references = [
            Reference(Output(f"number {each}"), [CORRECT_TAG] if each == number % 3 else []) for each in range(3)
        ]
        text = f"How many are {number}?" + " And this" * (length * number if split == "test" else 0)
        found.append(Instance(Input(text), references, split=split, id=f"id{number}"))
    return found


SPECS: dict[str, AdapterSpec] = {
    "examples": get_multiple_choice_adapter_spec("multiple_choice_joint", "Answer.", "Q", "A", max_train_instances=3),
    "no examples": get_generation_adapter_spec(max_tokens=2, max_train_instances=0),
    "separate": get_multiple_choice_adapter_spec(
        "multiple_choice_separate_original", "", "Q", "A", max_train_instances=1
    ),
    "language modelling": get_language_modeling_adapter_spec(),
}


def test_adapters_make_helms_own_requests_and_leave_its_random_states(deployment: str, tmp_path: Path) -> None:
    """Where everything fits, where examples are left out, and where prompts are cut."""
    helms, _ = service(tmp_path, known=False)
    ours, known = service(tmp_path, known=True)
    for kind, given in SPECS.items():
        spec = AdapterSpec(**{**vars(given), "model": "local/counted", "model_deployment": deployment})
        for length in (0, 2):
            asked = [each for each in instances(length) if kind != "language modelling" or each.split == "test"]
            found: list[Any] = []
            for adapt in (
                lambda spec=spec, asked=asked: AdapterFactory.get_adapter(spec, helms).adapt(asked, 1),
                lambda spec=spec, asked=asked: adapted(AdapterFactory.get_adapter(spec, ours), asked, 1, known),
            ):
                random.seed(7)
                np.random.seed(7)
                try:
                    states: Any = adapt()
                except Exception as error:
                    states = type(error)
                found.append((states, random.random(), np.random.random()))
            assert found[0] == found[1], (kind, length)
            known.forget()


class Drawing:
    """An adapter that draws before it asks, as HELM's would if they did not begin with a seed."""

    def __init__(self) -> None:
        self.window_service: Any = self

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        return len(text) < 3

    def adapt(self, instances: list[Instance], parallelism: int) -> list[Any]:
        drawn = [random.random(), np.random.random()]
        return [*drawn, *(self.window_service.fits_within_context_window(text) for text in ("ab", "abc"))]


def test_an_adapter_that_begins_again_draws_the_same(tmp_path: Path) -> None:
    random.seed(7)
    np.random.seed(7)
    expected = [*Drawing().adapt([], 1), random.random()]
    random.seed(7)
    np.random.seed(7)
    _, known = service(tmp_path, known=True)
    adapter: Any = Drawing()
    found: list[Any] = adapted(adapter, [], 1, known)
    assert [*found, random.random()] == expected
    assert adapter.window_service is adapter
