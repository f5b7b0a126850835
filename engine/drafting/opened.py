"""Opens a draft model: checks that it can draft for a model, and prepares its computation on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase, modeling_layers

from engine.cache.hidden import HiddenStates
from engine.cache.key_value import KVCache
from engine.cache.state import StateCache
from engine.checkpoint.description import ModelDescription, describe
from engine.checkpoint.tokenizer import load_tokenizer
from engine.drafting.head_drafts import HeadDrafts
from engine.drafting.head_shadows import HeadShadows
from engine.drafting.model_drafts import Computes, ModelDrafts
from engine.drafting.shadows import Shadows
from engine.errors import ConfigError, UnsupportedError, shown
from engine.kernels.threads import one_thread
from engine.memory.arena import Arena
from engine.model.causal_model import CausalModel
from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.policy import OWN_DRAFT
from engine.weights.loading import check_checkpoint, load_checkpoint
from engine.weights.store import WeightStore
from engine.weights.stream import WeightStream

MakeExecutor = Callable[[CausalModel, WeightStream, KVCache, StateCache, HiddenStates, Limits], Computes]


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """A draft model without its weights."""

    description: ModelDescription
    model: CausalModel
    is_own: bool = False
    """Whether it is a layer of the checkpoint that it drafts for."""

    @classmethod
    def of(
        cls, name: str, own: ModelDescription, target: CausalModel, tokenizer: PreTrainedTokenizerBase
    ) -> DraftModel:
        """Open the draft model of that name for `target`, which is described and whose tokenizer is given.

        Raises `ConfigError` where its tokenizer is another, `UnsupportedError` where one of the two keeps recurrent
        states or the checkpoint has no layer that drafts, and what opening any model raises.
        """
        if target.mixers:
            raise UnsupportedError(
                "draft-model: layers of the model keep a state, which cannot go back to before a draft that is wrong; "
                "leave it out"
            )
        dtype, device = target.dtype, target.device
        if name == OWN_DRAFT:
            head = head_of(Path(own.path), dtype, device, has_weights=own.weight_bytes > 0)
            return cls(description=own, model=head, is_own=True)
        description = describe(name)
        path = Path(description.path)
        check_vocabulary(name, load_tokenizer(path), tokenizer)
        with one_thread():
            model = CausalModel(path, dtype, device)
        if model.mixers:
            raise UnsupportedError(
                f"draft-model {name}: its layers keep a state, which cannot go back to before a draft that is wrong; "
                "take a model whose layers keep keys and values"
            )
        return cls(description=description, model=model)

    def check_weights(self) -> None:
        """Raise `CheckpointError` for weight files that do not fit; reads no weights."""
        check_checkpoint(Path(self.description.path), self.model)


@dataclass(frozen=True, kw_only=True)
class OpenedDraft:
    """A draft model with its memory on the device."""

    model: CausalModel
    weights: WeightStore
    stream: WeightStream
    cache: KVCache
    drafts: ModelDrafts
    loading: Iterator[None]
    """The loading of its weights: it copies one parameter at each step."""

    def follow(self, executor: Computes) -> None:
        """Have an MTP layer follow what the model's executor computes; others compute all by themselves."""
        if isinstance(self.drafts, HeadDrafts):
            executor.reads = self.drafts.computed

    def close(self) -> None:
        """Release everything; the arena frees the memory."""
        self.drafts.close()
        self.stream.close()
        self.weights.close()


def open_draft(
    draft: DraftModel, target: CausalModel, plan: Plan, arena: Arena, make_executor: MakeExecutor
) -> OpenedDraft:
    """Open a draft model for `target` by a plan of its own, all of it on the device."""
    model, path = draft.model, Path(draft.description.path)
    store = WeightStore(model, plan.weights, arena, expands_whole=plan.expands_whole)
    stream = None
    try:
        loading = load_checkpoint(path, store, with_digest=False)  # it changes no result
        stream = WeightStream(store, None, overlap=False, read_ahead_bytes=0, experts_apart=plan.experts_apart)
        cache = KVCache(model.kv_shapes, model.dtype, arena, plan.cache_budgets, plan.kv_cache)
        states = StateCache(model.state_shapes, arena, plan.cache_budgets, plan.kv_cache)
        hidden = HiddenStates(arena, plan.activations, model.hidden_size, model.hidden_dtype)
        window, offset = draft.description.window, model.outer.positions.offset
        executor = make_executor(model, stream, cache, states, hidden, plan.limits)
        window = None if window is None else window - offset
        drafts: ModelDrafts
        if draft.is_own:
            drafts = HeadDrafts(
                executor,
                HeadShadows(cache.room, plan.limits),
                plan.limits,
                target=target,
                window=window,
                is_ready=lambda: store.is_complete,
            )
        else:
            drafts = ModelDrafts(
                executor,
                Shadows(cache.room, plan.limits),
                plan.limits,
                device=arena.device,
                window=window,
                vocabularies=(model.vocab_size, target.vocab_size),
                is_ready=lambda: store.is_complete,
            )
    except BaseException:
        if stream is not None:
            stream.close()
        store.close()
        raise
    return OpenedDraft(model=model, weights=store, stream=stream, cache=cache, drafts=drafts, loading=loading)


def head_of(path: Path, dtype: torch.dtype, device: torch.device, *, has_weights: bool) -> CausalModel:
    """The MTP layer of a model directory; `UnsupportedError` where there is none that drafts."""
    if not hasattr(getattr(modeling_layers, "MtpModel", None), "forward_layer"):
        raise UnsupportedError(
            f"draft-model {OWN_DRAFT}: transformers {transformers.__version__} has no MTP layers as those of 5.24 are; "
            "take that version, name a small model of the same tokenizer, or leave draft-model out"
        )
    from engine.drafting.head_model import HeadModel

    with one_thread():
        return HeadModel(path, dtype, device, has_weights=has_weights)


def check_vocabulary(name: str, draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError`, naming the first difference, where token ids of two tokenizers mean different tokens."""
    own, other = ({number: token for token, number in each.get_vocab().items()} for each in (draft, target))
    if own == other:
        return
    number = next(number for number in sorted({*own, *other}) if own.get(number) != other.get(number))

    def told(tokens: dict[int, str]) -> str:
        return shown(tokens[number]) if number in tokens else "no token"

    raise ConfigError(
        f"draft-model {name}: its tokenizer is not the model's: id {number} is {told(own)} there and {told(other)} "
        f"here ({len(own)} and {len(other)} tokens); take a smaller model of the same family"
    )
