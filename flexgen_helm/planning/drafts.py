"""What a policy's draft model takes, for plans that are made without opening it."""

from __future__ import annotations

from pathlib import Path

from engine.planning.model_shape import ModelShape
from engine.policy import OWN_DRAFT, Policy


def draft_shape(policy: Policy, dtype: str, path: str | Path, *, has_weights: bool = True) -> ModelShape | None:
    """Sizes of the policy's draft model in a number format of torch's; None without one. Downloads no weights.

    path: the directory of the model that it drafts for. has_weights: whether its weight files are there.
    Raises `EngineError` for a model that cannot be run.
    """
    if policy.draft_model is None:
        return None
    import torch

    from engine.checkpoint.description import describe
    from engine.drafting.opened import head_of
    from engine.model.causal_model import CausalModel
    from engine.weights.stored_form import shape_of

    if policy.draft_model == OWN_DRAFT:
        return shape_of(head_of(Path(path), getattr(torch, dtype), torch.device("cpu"), has_weights=has_weights))
    found = describe(policy.draft_model, download_weights=False)
    has_weights = found.weight_bytes > 0
    return shape_of(CausalModel(Path(found.path), getattr(torch, dtype), torch.device("cpu"), has_weights=has_weights))
