"""Models of real shapes with random weights, for benchmarks: nothing is downloaded, and no zeros flatter the card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.config import load_family_config, num_layers, read_config_file
from engine.checkpoint.model_class import check_causal, new_model
from engine.checkpoint.window import window_of
from engine.errors import CheckpointError, ConfigError, EngineError, UnsupportedError, did_you_mean, shown
from engine.reading import find_file, read_json_object
from flexgen_helm.planning.shapes import SHAPES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.engine import Engine
    from engine.member import Member
    from engine.model.causal_model import CausalModel
    from engine.policy import Policy
    from engine.weights.store import WeightStore

_BLOCK_ELEMENTS = 1 << 24


def shape_config(shape: str) -> dict[str, Any]:
    """The configuration named `shape`: one of `SHAPES`, a config.json, or a directory that holds one.

    In place of a config.json there may be a JSON object that names another shape as "shape", with what it changes.
    Raises `ConfigError` where there is none, `CheckpointError` for one whose fields cannot be meant.
    """
    if shape in SHAPES:
        return dict(SHAPES[shape])
    file = _config_file(shape)
    if not find_file(file, ConfigError):
        raise ConfigError(f"no shape {shape!r}{did_you_mean(shape, SHAPES)}, and no such config.json or directory")
    told = read_json_object(file, CheckpointError)
    if "model_type" in told or "shape" not in told:
        return read_config_file(file)
    base = told.pop("shape")
    if not isinstance(base, str) or base not in SHAPES:
        raise ConfigError(f"{file}: shape {shown(base)} is none{did_you_mean(str(base), SHAPES)}")
    return SHAPES[base] | told


def _config_file(shape: str) -> Path:
    path = Path(shape).expanduser()
    return path / "config.json" if path.is_dir() else path


def shape_name(shape: str) -> str:
    """What a record of `shape` is called after: its name, or that of its directory or file."""
    path = Path(shape)
    return shape if shape in SHAPES else path.stem if path.is_file() else path.name


def write_model_directory(shape: str, folder: Path) -> None:
    """Write configuration and a one-word tokenizer of `shape` into `folder`, and the header of packed weights.

    End-of-text is made impossible, so that completions reach the requested length. Raises `EngineError` for a shape
    that is no causal language model, or has fields that its family does not accept.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    config = shape_config(shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with _speaking_of(shape, folder):
        check_causal(folder, config)
        load_family_config(folder)
        if config.get("quantization_config"):
            from engine.checkpoint.quantized.methods import checked_method
            from flexgen_helm.planning.packed.weightless import write_weightless

            checked_method(folder, config["quantization_config"])
            try:
                write_weightless(folder, config)
            except UnsupportedError as error:
                raise UnsupportedError(f"{folder}: {error}; name the shape of an unquantized one") from None
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": -1}')


@contextmanager
def _speaking_of(shape: str, folder: Path) -> Iterator[None]:
    """Inside, errors about the model directory written into `folder` name `shape` instead."""
    try:
        yield
    except EngineError as error:
        file = shape if shape in SHAPES else str(_config_file(shape))
        told = str(error).replace(str(folder / "config.json"), file).replace(str(folder), shape)
        raise type(error)(told) from None


def shape_model(shape: str, dtype: str, folder: Path) -> CausalModel:
    """The model of `shape` without weights, in a number format of torch's; its directory is written into `folder`.

    Raises `EngineError` for one that cannot be run.
    """
    import torch

    from engine.model.causal_model import CausalModel

    write_model_directory(shape, folder)
    with _speaking_of(shape, folder):
        return CausalModel(folder, getattr(torch, dtype), torch.device("cpu"))


def open_dummy(shape: str, policy: Policy, member: Member | None = None) -> Engine:
    """An engine over random weights of `shape`, all in place; member: which it is of several that share them."""
    from engine.checkpoint.description import ModelDescription
    from engine.engine import Engine

    config = shape_config(shape)
    with tempfile.TemporaryDirectory(prefix="flexgen-dummy-") as folder:
        write_model_directory(shape, Path(folder))
        description = ModelDescription(
            path=folder,
            model_type=config["model_type"],
            window=window_of(config),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float16",
            weight_bytes=0,
            num_layers=num_layers(config),
        )
        with _speaking_of(shape, Path(folder)):
            engine = Engine.open(description, policy, fill_randomly, member)
        try:
            engine.wait_until_loaded()
        except BaseException:
            engine.close()
            raise
        return engine


def fill_randomly(store: WeightStore) -> Iterator[None]:
    """Put small random numbers everywhere, or random codes: one random block, repeated. Of a shape, one is encoded."""
    from flexgen_helm.planning.packed.random_codes import RandomCodes

    block, packed = _random_block(), store.model.packed
    random = RandomCodes() if packed else None
    stored: dict[tuple[torch.dtype, torch.Size], list[tuple[int, torch.Tensor]]] = {}
    for unit in store.model.units:
        for name in unit.owners:
            if random is not None and name in packed:
                random.fill(store, name)
                store.arrive(name)
                yield
                continue
            like, codec = store.model.state[name], store.codec_of(name)
            if codec is None:
                for first in range(0, like.numel(), len(block)):
                    store.put(name, block[: like.numel() - first], first_element=first)
            else:
                kind = like.dtype, like.shape
                if kind not in stored:
                    values = block.repeat(-(-like.numel() // len(block)))[: like.numel()]
                    stored[kind] = list(codec.encoded(name, like, 0, values, store.arena.device))
                for first, part in stored[kind]:
                    store.put_stored(name, part, first)
            store.arrive(name)
            yield


def random_model(shape: str) -> PreTrainedModel:
    """The stock `transformers` model of `shape` in host memory, in its own dtype, filled as `fill_randomly` does.

    Of one that is published packed, the unpacked model.
    """
    import torch
    from transformers import AutoConfig

    from engine.model.build import parameters_on_meta

    config = shape_config(shape)
    config.pop("quantization_config", None)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float16")
    built = AutoConfig.for_model(config.pop("model_type"), **config)
    with parameters_on_meta():  # real buffers (rotary tables), no storage for parameters
        model = new_model(built, dtype=dtype)
    block = _random_block().to(dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            filled = torch.empty(parameter.shape, dtype=dtype)
            flat = filled.view(-1)
            for first in range(0, flat.numel(), len(block)):
                flat[first : first + len(block)].copy_(block[: flat.numel() - first])
            module._parameters[name] = torch.nn.Parameter(filled, requires_grad=False)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    model.eval()
    return model


def _random_block() -> torch.Tensor:
    import torch

    return torch.randn(_BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
