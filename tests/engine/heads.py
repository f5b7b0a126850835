"""Tiny models whose checkpoint contains an MTP layer, in the layout of the family's own checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

_MELLUM = {
    **{"num_nextn_predict_layers": 1, "num_hidden_layers": 3, "sliding_window": 8, "mlp_layer_types": ["sparse"] * 3},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_MELLUM_NAMES = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
_ENDS = ("o_proj.weight", "down_proj.weight", "down_proj")
"""The matrices by whose products a layer adds to hidden states."""


def save_with_head(directory: Path, family: str, likeness: float) -> Path:
    """Write a tiny model with an MTP layer.

    likeness: 1 for a model and a layer that both choose by a token alone, and so agree; 0 for two random ones.
    """
    from transformers.modeling_layers import MtpModel

    if family == "deepseek_v3":
        models.save_model(directory, "deepseek-v3")
    else:
        models.save_random(directory, models.small_config_of(family, **(_MELLUM if family == "mellum" else {})))
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        _fade(model, likeness)
        layer = MtpModel(model, 1)
        for parameter in layer.layers.parameters():
            parameter.copy_(1.0 if parameter.ndim == 1 else 0.2 * torch.randn(parameter.shape, generator=generator))
        _fade(layer.layers, likeness)
        merged, width = layer.layers[0].eh_proj.weight, layer.config.hidden_size
        merged.mul_(1 - likeness)[:, :width] += likeness * torch.eye(width)
        layer.layers[0].post_norm.weight.copy_(model.model.norm.weight)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    save_file({**load_file(file), **_tensors(model, layer)}, file, metadata={"format": "pt"})
    return directory


def _fade(module: torch.nn.Module, likeness: float) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith(_ENDS):
            parameter.mul_(1 - likeness)


def _tensors(model: PreTrainedModel, layer: Any) -> dict[str, torch.Tensor]:
    """The layer's tensors as checkpoints of the family name them."""
    found: dict[str, torch.Tensor] = {}
    is_mellum = model.config.model_type == "mellum"
    base = "mtp.layers.0." if is_mellum else f"model.layers.{model.config.num_hidden_layers}."
    for name, tensor in layer.layers[0].state_dict().items():
        inside, attribute = name.removeprefix("mtp_block."), name.partition(".")[0]
        if is_mellum and inside == name:
            found[f"mtp.{_MELLUM_NAMES[attribute]}.weight"] = tensor
        elif attribute == "post_norm":
            found[f"{base}shared_head.norm.weight"] = tensor
        elif inside.startswith("mlp.experts."):
            for number, matrix in enumerate(tensor):
                parts = (
                    {"down_proj": matrix}
                    if "down" in inside
                    else dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
                )
                found |= {f"{base}mlp.experts.{number}.{part}.weight": each for part, each in parts.items()}
        else:
            found[base + inside] = tensor
    if not is_mellum:  # these are the model's, and once more beside the layer; they are not read
        found |= {f"{base}{name}.weight": model.lm_head.weight * 2 for name in ("embed_tokens", "shared_head.head")}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def know_layers(patch: pytest.MonkeyPatch) -> None:
    """Have transformers' classes know the MTP layer behind three layers: they list those of published checkpoints."""
    from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM

    for kind in (DeepseekV3ForCausalLM, Glm4MoeForCausalLM):
        patch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])


def stock_drafts(
    directory: Path, prompts: Sequence[Sequence[int]], count: int
) -> list[tuple[list[int], dict[int, list[int]]]]:
    """What transformers generates greedily with the layer, and its drafts by the number of tokens before them."""
    from transformers.generation.candidate_generator import MTPCandidateGenerator

    drafts: dict[int, list[int]] = {}
    get_candidates = MTPCandidateGenerator.get_candidates

    def noted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = get_candidates(self, input_ids, *args, **kwargs)
        drafts[input_ids.shape[1]] = found[0][0, input_ids.shape[1] :].tolist()
        return found

    model = models.load_reference(directory)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MTPCandidateGenerator, "get_candidates", noted)
        for prompt in prompts:
            drafts = {}
            ids = torch.tensor([prompt])
            made = model.generate(ids, max_new_tokens=count, do_sample=False, use_mtp=True, eos_token_id=None)
            told.append((made[0, len(prompt) :].tolist(), drafts))
    return told


def chained_drafts(directory: Path, tokens: list[int], size: int) -> list[int]:
    """What the layer drafts behind `tokens` when each further row continues its own output, computed as a whole."""
    from transformers.modeling_layers import MtpModel

    model = models.load_reference(directory)
    layer = MtpModel.from_pretrained(model).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        continued = model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
        for _ in range(size):
            positions = torch.arange(1, ids.shape[1])[None]
            rows = layer.forward_layer(0, continued, positions, None, input_ids=ids[:, 1:])
            ids = torch.cat([ids, layer._project_to_logits(rows[:, -1:]).argmax(-1)], dim=1)
            continued = torch.cat([continued, rows[:, -1:]], dim=1)
    return ids[0, len(tokens) :].tolist()
