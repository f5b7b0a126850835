"""How the engine would run a model, found without its weights' values: path, packed form, experts, windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.checkpoint.config import count_of

if TYPE_CHECKING:
    from engine.batch.reach import Reach
    from engine.model.causal_model import CausalModel

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """How the engine would run a model."""

    family: str
    """Its class in transformers and its model type."""
    num_layers: int
    path: str
    """How attention is called: "attention interface" or "own attention"."""
    windows: dict[str, int]
    """The number of layers by the most tokens that they attend to, "all" without a limit; empty where the family's
    code decides."""
    packed: str | None
    """What packed the checkpoint's matrices, None for plain numbers."""
    packed_matrices: int
    rounds_inputs: bool
    """Whether the inputs of packed layers are rounded, as the checkpoint requires."""
    experts: int
    """The number of experts of a layer; 0 without."""
    chosen_experts: int
    """The number of experts chosen for a token."""

    def lines(self) -> list[str]:
        """The facts in words."""
        how = {
            "attention interface": "through transformers' attention interface, prompts packed without padding",
            "own attention": "with the family's own attention, in padded micro-batches",
        }[self.path]
        lines = [f"{self.num_layers} layers, {how}"]
        if {*self.windows} - {"all"}:
            told = [f"{count} within {size} tokens" for size, count in self.windows.items() if size != "all"]
            told += [f"{self.windows['all']} over all tokens"] if "all" in self.windows else []
            lines.append(f"layers attend: {', '.join(told)}")
        if self.experts:
            lines.append(f"{self.experts} experts a layer, {self.chosen_experts} for a token")
        if self.packed:
            rounded = ", inputs rounded as the checkpoint asks for" if self.rounds_inputs else ""
            lines.append(f"weights packed by {self.packed}: {self.packed_matrices} matrices stay so{rounded}")
        return lines


def _told(reach: Reach) -> str:
    if reach.is_whole:
        return "all"
    return str(reach.window) if reach.chunk is None else f"chunks of {reach.chunk}"


def model_facts(model: CausalModel) -> ModelFacts:
    """The facts about a model that was built without weights."""
    config = model.config.get_text_config()
    windows = Counter(_told(reach) for reach in model.sweeping.reaches.values())
    experts = count_of(config, *_EXPERTS)
    return ModelFacts(
        family=f"{type(model.module).__name__} ({model.config.model_type})",
        num_layers=len(model.layers),
        path="own attention" if model.is_padded else "attention interface",
        windows={} if model.is_padded else dict(windows),
        packed=_packing(model.quantization),
        packed_matrices=len(model.packed),
        rounds_inputs=model.rounds_inputs,
        experts=experts,
        chosen_experts=count_of(config, *_CHOSEN) if experts else 0,
    )


def _packing(told: Mapping[str, Any] | None) -> str | None:
    if not told:
        return None
    method = told.get("quant_method") or "an unnamed method"
    return str(getattr(method, "value", method))
