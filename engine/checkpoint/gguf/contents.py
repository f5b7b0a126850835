"""The contents of a GGUF file as transformers reads them: config, tokenizer, and the parameter of each tensor."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.gguf.header import check_header
from engine.checkpoint.gguf.index import GGUF_FILE, PLAIN, Place
from engine.checkpoint.model_class import new_model
from engine.errors import CheckpointError, EngineError, InstallationError, UnsupportedError, named, shown
from engine.kernels.packed.ggml_blocks import FORMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIZES = {
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Fields that transformers ignores for some families, whose defaults it uses instead: both must agree."""
_CURE = "take the model's checkpoint in safetensors files"
_EXPERTS = re.compile(r"\.ffn_(gate|up|down)_exps\.weight$")


@dataclass(frozen=True)
class Contents:
    """The contents of a GGUF file as a model directory has them, except its weights."""

    config: Mapping[str, Any]
    """The contents of config.json."""
    tokenizer: PreTrainedTokenizerBase | None
    told: Mapping[str, Any]
    """The file's metadata fields about its tokenizer, by full name."""
    places: Mapping[str, Place]
    """The place of each tensor in the file, by parameter name of the model."""


def read_contents(folder: Path, shown_as: Path, *, has_tokenizer: bool = True) -> Contents:
    """Read `GGUF_FILE` in a directory that holds nothing else; messages name it `shown_as`.

    has_tokenizer: whether to read its tokenizer. Raises `CheckpointError` for a file that cannot be read,
    `UnsupportedError` for contents that transformers, or the engine, would not honour, `InstallationError` where the
    gguf package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InstallationError(
            f"{shown_as} is a GGUF file, and transformers needs gguf to read it ({named(error)}); run `pip install "
            "gguf`"
        ) from None
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    check_header(folder / GGUF_FILE, shown_as)
    try:
        reader = GGUFReader(folder / GGUF_FILE)
        _check_architecture(reader, shown_as)
        told = load_gguf_checkpoint(str(folder / GGUF_FILE))["config"]
        config = AutoConfig.from_pretrained(folder, gguf_file=GGUF_FILE)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE) if has_tokenizer else None
        with torch.device("meta"):
            model = new_model(config, dtype=torch.float16)
    except EngineError:
        raise
    except Exception as error:  # whatever its reader and transformers find wrong with a file
        raise CheckpointError(
            f"{shown_as} cannot be read as a GGUF file by transformers: {named(error)}; fetch it again, or update gguf "
            "if the file is newer"
        ) from None
    try:
        _check_fields(reader, config, shown_as)
        places = dict(_places(reader, model, _with_heads(told, reader, config, shown_as), shown_as))
    except ImportError as error:
        raise UnsupportedError(
            f"{shown_as}: transformers {transformers.__version__} has its tables for GGUF files elsewhere than 5.24 "
            f"({named(error)}); take that version"
        ) from None
    packed = any(place.type in FORMS for place in places.values())
    settings = {
        **json.loads(config.to_json_string(use_diff=False)),
        "architectures": [type(model).__name__],
        "dtype": "float16" if packed else _plain_dtype(places),  # as scales are; the model's own is not told
        "quantization_config": {"quant_method": "gguf"} if packed else None,
    }
    left_out = ("_name_or_path", "transformers_version")  # of where and when it was read
    kept = {name: value for name, value in settings.items() if value is not None and name not in left_out}
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.ggml.")}
    return Contents(kept, tokenizer, fields, places)


def _check_architecture(reader: Any, file: Path) -> None:
    """Raise `UnsupportedError` for an architecture that transformers does not read from GGUF files."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    architecture = str(reader.fields["general.architecture"].contents())
    if _squeezed(architecture) not in map(_squeezed, GGUF_SUPPORTED_ARCHITECTURES):
        raise UnsupportedError(
            f"{file} is of the architecture {shown(architecture)}, which transformers {transformers.__version__} does "
            f"not read from a GGUF file; {_CURE}"
        )


def _squeezed(name: str) -> str:
    """The form of an architecture's name that llama.cpp and transformers share, such as qwen3moe for qwen3_moe."""
    return re.sub("[-_]", "", name)


def _with_heads(told: Mapping[str, Any], reader: Any, config: Any, file: Path) -> Mapping[str, Any]:
    """What transformers reads of a file, with the number of key-value heads, which a file may leave out.

    The number defaults to that of the query heads; without it transformers would leave rows in the file's order.
    """
    architecture, text = str(reader.fields["general.architecture"].contents()), config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    found = getattr(text, "num_key_value_heads", heads)
    if f"{architecture}.attention.head_count_kv" not in reader.fields and found != heads:
        raise UnsupportedError(
            f"{file} does not set {architecture}.attention.head_count_kv, and transformers uses {found} for it, "
            f"where {heads} is right; {_CURE}"
        )
    return {**told, "num_attention_heads": heads, "num_key_value_heads": found}


def _plain_dtype(places: Mapping[str, Place]) -> str:
    """The dtype of most numbers in matrices."""
    sizes: Counter[str] = Counter()
    for place in places.values():
        if len(place.shape) > 1:
            sizes[PLAIN[place.type]] += math.prod(place.shape)
    return max(sizes, key=sizes.__getitem__, default="float32")


def _check_fields(reader: Any, config: Any, file: Path) -> None:
    """Raise `UnsupportedError` for metadata of the architecture that transformers ignores."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture = str(reader.fields["general.architecture"].contents())
    text = config.get_text_config()
    mappings: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    mapped = mappings.get(architecture) or mappings.get(text.model_type) or {}
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {**text.to_dict(), "head_dim": head_dim}
    for field in reader.fields:
        key = field.removeprefix(f"{architecture}.")
        if field.startswith("split.") and key == "split.count" and reader.fields[field].contents() > 1:
            raise UnsupportedError(f"{file} is one of several files of a model; put them together, or take one file")
        if key == field or mapped.get(key) is not None:
            continue
        value = reader.fields[field].contents()
        expected = sizes.get(_SIZES.get(key, ""))
        if expected is None or value != expected:
            taken = "" if expected is None else f", and takes {expected} for it"
            raise UnsupportedError(
                f"{file}: transformers does not look at {field}, which is {shown(value)}{taken}; {_CURE}"
            )


def _places(reader: Any, model: Any, told: Mapping[str, Any], file: Path) -> Iterator[tuple[str, Place]]:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = str(reader.fields["general.architecture"].contents())
    kinds: Mapping[str, Any] = TENSOR_PROCESSORS
    processor = kinds.get(architecture, TensorProcessor)(config=told)
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # a family that the gguf package does not know
        raise UnsupportedError(f"{file}: transformers has no names for its tensors: {named(error)}") from None
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape)))
        experts = _EXPERTS.search(tensor.name)
        target = names.get(tensor.name.removesuffix(".weight") if experts else tensor.name)
        if target is None:
            raise UnsupportedError(f"{file} holds {shown(tensor.name)}, which transformers does not read; {_CURE}")
        if kind not in PLAIN and kind not in FORMS:
            raise UnsupportedError(
                f"{file}: {tensor.name} is of the type {kind}; {', '.join((*FORMS, *PLAIN))} can be run: take a file "
                "of these, or the model's checkpoint in safetensors files"
            )
        first, size = int(tensor.data_offset), int(tensor.n_bytes)
        if experts:
            yield from _experts(target, experts.group(1), kind, shape, first, size)
            continue
        found, heads = _asked(processor, tensor.name, shape, file)
        if heads and kind in PLAIN and len(shape) > 1:
            raise UnsupportedError(
                f"{file}: {tensor.name} is of the type {kind} with rows in GGUF's order, where {', '.join(FORMS)} can "
                f"be run; {_CURE}"
            )
        yield target, Place(kind, found, first, size, heads)


def _experts(
    target: str, which: str, kind: str, shape: tuple[int, ...], first: int, size: int
) -> Iterator[tuple[str, Place]]:
    """Give each expert a matrix of its own, under the name that safetensors checkpoints use."""
    each, folder = size // shape[0], target.rpartition(".")[0]
    for index in range(shape[0]):
        yield f"{folder}.{index}.{which}_proj.weight", Place(kind, shape[1:], first + index * each, each)


def _asked(processor: Any, name: str, shape: tuple[int, ...], file: Path) -> tuple[tuple[int, ...], int]:
    """The shape that transformers gives a tensor, and the number of heads by which it reorders rows (0: no reordering).

    Both are found by passing numbered rows through transformers' own conversion.
    """
    import numpy as np

    rows = np.arange(shape[0], dtype=np.float32)
    try:
        given = rows.reshape(-1, *([1] * (len(shape) - 1)))
        result = processor.process(weights=given.copy(), name=name, tensor_key_mapping={}, parsed_parameters={})
        made: Any = result.weights
        if result.name == name and made.size == rows.size:
            if made.shape != given.shape and len(shape) == 1 and (made.reshape(-1) == rows).all():
                return tuple(made.shape), 0
            if made.shape == given.shape and (made == given).all():
                return shape, 0
            for heads in (processor.config.get(f"num_{kind}_heads") for kind in ("attention", "key_value")):
                if made.shape == given.shape and heads and rows.size % (2 * heads) == 0:
                    turned = rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
                    if (made.reshape(-1) == turned).all():
                        return shape, int(heads)
    except Exception as error:  # it has code for the shapes of its own family
        raise UnsupportedError(f"{file}: what transformers does to {name} is not known ({named(error)})") from None
    raise UnsupportedError(
        f"{file}: transformers changes the numbers of {name}, or their order, in a way that is not known here; {_CURE}"
    )
