"""The layer for the token after next that some checkpoints contain (MTP), as a model that is driven like any other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_layers import MtpModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import local_torch_dtype

from engine.checkpoint.adapters.declared import adapter_folder
from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.tensors import tensors
from engine.errors import UnsupportedError, named
from engine.model.build import build, parameters_on_meta
from engine.model.causal_model import CausalModel
from engine.policy import OWN_DRAFT

_INSIDE = "model.mtp."
"""Where the parameters of transformers' MTP model are in the module that is driven."""
_UNREAD = ""
"""The name that tensors of the model's other layers get."""


class _Layer(nn.Module):
    """transformers' MTP layer without its loop over drafted tokens, with rows of several sequences in one call."""

    def __init__(self, main: PreTrainedModel) -> None:
        super().__init__()
        self.mtp = MtpModel(main, num_mtp_layers=1)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        continued: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """Compute rows: tokens `[1, rows]`, one less than their positions, and what they continue `[1, rows, width]`.

        Without positions, rows are those of one sequence; without what they continue, they continue zeros.
        """
        embedded = self.mtp.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if continued is None:
            continued = torch.zeros_like(embedded)
        # A sequence's first token continues nothing and has no row, so rows are counted from its second one.
        hidden = self.mtp.forward_layer(0, continued, position_ids + 1, None, inputs_embeds=embedded)
        return BaseModelOutput(last_hidden_state=hidden)


class _Head(PreTrainedModel):
    """The MTP layer between token embedding and head, in the form of a causal language model."""

    base_model_prefix = "model"
    # Some checkpoints hold embedding and head once more beside the layer: the model's are taken, as by transformers.
    _keys_to_ignore_on_load_unexpected = [f"^{_UNREAD}$", *MtpModel._keys_to_ignore_on_load_unexpected]  # noqa: RUF012
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = True
    _tied_weights_keys = {f"{_INSIDE}shared_head.weight": f"{_INSIDE}embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, main: PreTrainedModel) -> None:
        layer = _Layer(main)
        super().__init__(layer.mtp.config)
        self.model = layer
        self.mtp_names = MtpModel.get_mtp_weights_regex(main)
        """Matches the checkpoint's names of the layer's tensors."""
        self.transforms = layer.mtp.get_weight_conversions(main)
        """How transformers makes the layer's parameters of the checkpoint's tensors."""
        self.main_names = CheckpointNames(main, dict(main.state_dict()))
        """The checkpoint's other names, by which the token embedding and the head are found."""
        modules = {id(module): name for name, module in main.named_modules()}
        self.shared_names = {
            f"{modules[id(own)]}.weight": f"{_INSIDE}{name}.weight"
            for name, own in (("embed_tokens", main.get_input_embeddings()), ("shared_head", main.lm_head))
        }
        """The names, in this module, of what it shares with the model, by the model's names."""
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        embedding: nn.Module = self.model.mtp.embed_tokens
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.model.mtp.shared_head
        return head

    def get_decoder(self) -> nn.Module:
        """What contains the layer."""
        layer: nn.Module = self.model
        return layer

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return MtpModel._can_set_experts_implementation()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutput:
        """Compute the logits of all rows."""
        hidden = self.model(input_ids, position_ids).last_hidden_state
        return CausalLMOutput(logits=self.model.mtp._project_to_logits(hidden))


class _HeadNames(CheckpointNames):
    """The names that the tensors of a whole checkpoint get in a `_Head`; all but a few are not read."""

    def __init__(self, module: _Head, state: dict[str, Any]) -> None:
        super().__init__(module, state)
        self._mtp: re.Pattern[str] = module.mtp_names
        self._main, self._shared = module.main_names, module.shared_names
        self._renamings = [each for each in module.transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in module.transforms if isinstance(each, WeightConverter)]
        self.converter_of = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def _find(self, name: str) -> tuple[str, str | None]:
        if self._mtp.search(name):
            target, pattern = rename_source_key(name, self._renamings, self._converters)
            return f"{_INSIDE}{target}", pattern
        target, pattern = self._main.target(name)
        return (self._shared[target], pattern) if target in self._shared else (_UNREAD, None)


def _build_head(path: Path, dtype: torch.dtype) -> _Head:
    """Build the MTP layer of a directory's model, parameters on `meta`; `UnsupportedError` where it has none."""
    main = build(path, dtype)
    count, family = getattr(main.config.get_text_config(), "num_mtp_layers", None), type(main).__name__
    if not count:
        told = "has no num_mtp_layers" if count is None else f"says num_mtp_layers {count}"
        raise _refused(
            f"the config of {family} in {path} {told}: transformers knows no MTP layer of it that could draft"
        )
    if count > 1:
        raise _refused(f"{family} in {path} has {count} MTP layers in a chain, and only a single one drafts here")
    try:
        with parameters_on_meta(), local_torch_dtype(dtype):
            head = _Head(main)
    except Exception as error:  # whatever the family's config or class lacks
        raise _refused(f"transformers cannot build the MTP layer of {family} in {path}: {named(error)}") from None
    head.train(False)
    return head


def _refused(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"draft-model {OWN_DRAFT}: {why}; name a small model of the same tokenizer, or leave draft-model out"
    )


class HeadModel(CausalModel):
    """The model of a directory reduced to its token embedding, its MTP layer, and its head.

    Row by row, it takes a token and the model's normed output for the token before, and predicts the next token.
    """

    _built = staticmethod(_build_head)
    _names = _HeadNames

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, *, has_weights: bool = True) -> None:
        """As in `CausalModel`; raises `UnsupportedError` for a directory without such a layer."""
        if adapter_folder(path) is not None:
            raise _refused(f"an adapter changes the model in {path}, whose MTP layer continues the base model")
        super().__init__(path, dtype, device, has_weights=has_weights)
        if self.mixers or self.indexers or self.is_padded:
            raise _refused(
                f"the MTP layer in {path} keeps more of a token than keys and values, or has its own attention"
            )
        own = {name for unit in self.units if unit.name == "layer.0" for name in unit.owners}
        if has_weights and not any(self.names.target(name)[0] in own for name, _ in tensors(path)):
            raise _refused(f"the weight files in {path} lack the MTP layer of which the config tells")
        # What its rows continue is kept beside them.
        self.sweeping.handed_row_bytes = self.hidden_size * dtype.itemsize
