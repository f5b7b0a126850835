"""Tiny models, each built once for the whole session, and plain `transformers` beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import models
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

Build = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on several threads, and much slower where other processes take turns with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded weights are not kept in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Directory of the tiny model of a family."""
    built: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in built:
            built[family] = models.save_model(tmp_path_factory.mktemp(family), family)
        return built[family]

    return of


@pytest.fixture(scope="session")
def reference(build: Build) -> Callable[[str], PreTrainedModel]:
    """The tiny model of a family in plain `transformers`."""
    loaded: dict[str, PreTrainedModel] = {}

    def of(family: str) -> PreTrainedModel:
        if family not in loaded:
            loaded[family] = models.load_reference(build(family))
        return loaded[family]

    return of


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all tiny models."""
    return models.make_tokenizer()
