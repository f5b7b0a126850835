"""Builds a stock transformers model without weights, and finds its decoder layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from engine.checkpoint.model_class import new_model
from engine.errors import CheckpointError, UnsupportedError, named
from engine.model.attention.interface import ATTENTION_NAME

_PATCHING = threading.Lock()
"""Held while `nn.Module` is patched, which all threads share."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules of this thread get parameters without storage, but real buffers (rotary tables and the like)."""
    thread = threading.get_ident()
    with _PATCHING:
        register = nn.Module.register_parameter

        def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and threading.get_ident() == thread:
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            register(self, name, param)

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def build(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a directory, parameters on `meta`; `CheckpointError` or `UnsupportedError` if impossible."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = _on_meta(config, dtype, ATTENTION_NAME)
    except Exception as error:  # whatever values of another kind or size lead to in the family's code
        raise CheckpointError(
            f"{path}: transformers cannot build this model from its config.json: {named(error)}"
        ) from None
    if getattr(model.config, "is_encoder_decoder", False) is True:
        raise UnsupportedError(
            f"{type(model).__name__} ({config.model_type}) cannot be run here: it is the decoder of an "
            "encoder-decoder; only causal (decoder-only) models run here"
        )
    _keep_precision(model, dtype)
    model.eval()
    return model


def _keep_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen what the family keeps in float32 in half precision, as `from_pretrained` does (its `_get_dtype_plan`)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, by_group, _ = build_glob_alternation(list(plan))
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for attribute, tensor in table.items():
                found = pattern.search(f"{prefix}.{attribute}" if prefix else attribute)
                if tensor is not None and tensor.is_floating_point() and found and found.lastgroup:
                    kept = tensor.to(plan[by_group[found.lastgroup]])
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[attribute] = nn.Parameter(kept, requires_grad=False) if is_parameter else kept


def default_attention(model: PreTrainedModel) -> str:
    """The attention implementation that `from_pretrained` uses for such a model by default.

    transformers' own check chooses it: a second model of real size would take a second to be built.
    """
    return str(model._check_and_adjust_attn_implementation(None, is_init_check=True))


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    try:
        with parameters_on_meta():
            model = new_model(config, dtype=dtype, attn_implementation=attention)
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise
        return _on_meta(config, dtype, None)  # a family with a table of its own attentions gets its default one
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the decoder layers, in the order of their calls."""
    count = getattr(_text_config(model), "num_hidden_layers", None)
    root = model.get_decoder() or model.base_model
    for base in (root, model.base_model):
        towers = [  # of images or audio, which may have as many layers
            f"{name}."
            for name, module in base.named_modules()
            if name and isinstance(module, PreTrainedModel) and type(module.config) is not type(_text_config(model))
        ]
        for name, module in base.named_modules():
            is_inside = any(name.startswith(tower) for tower in towers)
            if isinstance(module, nn.ModuleList) and len(module) == count and not is_inside:
                return module
    outermost = _outermost_lists(root)
    if len(outermost) == 1:
        return next(iter(outermost.values()))
    told = ", ".join(f"{name} ({len(layers)})" for name, layers in outermost.items()) or "none"
    raise UnsupportedError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be run here: its layers are not in one list "
        f"(its lists: {told})"
    )


def give_each_its_own(layers: nn.ModuleList, model: PreTrainedModel) -> None:
    """Give layers that share a module with another layer a copy of it, still without numbers.

    Each then has parameters of its own, and the shared values are loaded for each.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    taken = set[int]()
    for layer in layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                own = [names[id(parameter)] for parameter in child.parameters()]
                if id(child) in taken and own and tied.issuperset(own):
                    configs = (each.config for each in child.modules() if hasattr(each, "config"))
                    module._modules[name] = deepcopy(child, {id(config): config for config in configs})
        taken |= {id(module) for module in layer.modules()}


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    config: PreTrainedConfig = model.config.get_text_config()
    return config


def _outermost_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found
