"""A stock `transformers` model taken apart: record (embeddings and layer arguments), layers, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.cache.shape import KVShape
from engine.cache.state_shape import StateShape
from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.quantized.declared import declared_quantization
from engine.checkpoint.quantized.methods import checked_method
from engine.checkpoint.quantized.packed_parts import find_packed
from engine.checkpoint.tied_head import is_tied, twins_of
from engine.errors import UnsupportedError
from engine.kernels.invariant.mode import BatchInvariant
from engine.kernels.packed.parameter import PackedParameter
from engine.model.attention import flash
from engine.model.build import build, decoder_layers, give_each_its_own
from engine.model.experts.interface import keep_experts_apart, names_of_matrices, take_experts
from engine.model.family_probe import probe
from engine.model.fused.gates import fuse_gates
from engine.model.fused.norms import fuse_norms
from engine.model.fused.rectifiers import fuse_rectifiers
from engine.model.fused.rotations import fuse_rotations
from engine.model.indexers.indexer import Indexer
from engine.model.mixers.mixer import Mixer
from engine.model.outer_forward import OuterForward
from engine.model.probing.unused import unused_parameters
from engine.model.stub import CallRecorder, LayerCall, LayerStub
from engine.model.sweep_context import SweepContext
from engine.model.unit import Unit


class CausalModel:
    """Drives a decoder-only `transformers` model (5.x) layer by layer; its parameters are on `meta` until bound.

    The family's own code makes embeddings, positions, rotary tables and the final norm and head: `record` calls the
    model's forward with stubs in place of the layers, and `head` calls it with the last hidden state injected.
    """

    _built = staticmethod(build)
    """Builds the module that is driven."""
    _names: type[CheckpointNames] = CheckpointNames

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch_invariant: bool = False,
        has_weights: bool = True,
    ) -> None:
        """has_weights: whether to read the weight files' headers, too; without, a quantized model is not recognised."""
        self.device, self.dtype = device, dtype
        self.module = self._built(path, dtype)
        self.config = self.module.config
        self.expert_configs = take_experts(self.module)
        """The configs of those modules whose experts our function computes."""
        self.expert_matrices = names_of_matrices(self.module) if self.expert_configs else frozenset[str]()
        """The parameters of experts that our function computes, which can be decoded for some experts at a time."""
        if batch_invariant and not self.expert_configs:  # grouped products choose by how many rows each expert has
            keep_experts_apart(self.module)
        self.sweeping = SweepContext(arithmetic=BatchInvariant() if batch_invariant else nullcontext())
        """The context that our attention function reads when layers call it."""
        self.state: dict[str, torch.Tensor] = dict(self.module.state_dict())
        """Parameters and persistent buffers by the names that checkpoint names are mapped to, on `meta`."""
        self.names = self._names(self.module, dict(self.state))
        """Maps the names of checkpoint tensors to the model's."""
        self._buffer_owners = {
            f"{prefix}.{name}" if prefix else name: (module, name)
            for prefix, module in self.module.named_modules()
            for name in module._buffers
        }
        self.embedding: nn.Module = self.module.get_input_embeddings()
        self.output: nn.Module | None = self.module.get_output_embeddings()
        if self.output is None:
            raise UnsupportedError(f"{type(self.module).__name__} has no output embedding; it cannot be run here")
        self.head_name = next(name for name, module in self.module.named_modules() if module is self.output) + ".weight"
        """The full name of the head's weight."""
        self.is_tied = is_tied(path if has_weights else None, self.module, self.names, self.state, self.head_name)
        """Whether the head's weight is the token embedding's."""
        self.twins = twins_of(self.module, self.head_name)
        """Parameters that a checkpoint may hold under one of several names, by each name."""
        slots = decoder_layers(self.module)
        give_each_its_own(slots, self.module)
        self.layers = list(slots)
        self.units = self._find_units()
        self.quantization = declared_quantization(path, getattr(self.config, "quantization_config", None))
        """The directory's quantization settings; None if it is not quantized."""
        self.all_packed: dict[str, PackedParameter] = self._find_packed(path, has_weights)
        """The parameters that the checkpoint holds packed."""
        self.packed = {name: packed for name, packed in self.all_packed.items() if name != self.embedding_name}
        """The parameters that are stored packed; the token embedding, whose rows are looked up, is decoded while
        loading."""
        self.recorder = CallRecorder(len(self.layers))
        """The recorder of the stubs that replace the layers while the model's own forward is called."""
        for index, layer in enumerate(self.layers):
            slots[index] = LayerStub(index, layer, self.recorder)
            for module in layer.modules():
                module.__dict__["sweeping"] = self.sweeping
        self.outer = OuterForward(self.module, self.recorder, self.sweeping)
        """The model's own forward, around the layers."""
        self.is_padded = False
        """Whether the family has its own attention: it then runs in padded micro-batches, with a view of our cache."""
        self.mixers: dict[int, Mixer] = {}
        """The modules that keep a recurrent state of each sequence, by layer."""
        self.indexers: dict[int, Indexer] = {}
        """The modules that choose the keys to attend to, by layer."""
        self.kv_shapes: list[KVShape] = probe(self)
        """The shape of keys and values by layer; of no width where a layer attends to nothing."""
        self.held = range(len(self.layers))
        """The layers that this process computes: all, unless the model is in stages."""
        self.elsewhere: frozenset[str] = frozenset()
        """The checkpoint's names of the parts of packed parameters that other stages have."""
        self.hidden_dtype: torch.dtype = self.sweeping.left or dtype
        """The dtype of hidden states between layers: a family may accumulate them in a wider one."""
        self._leave_out(unused_parameters(self))
        fuse_norms(self.layers, self.sweeping, device, dtype)
        fuse_rotations(self.layers, self.sweeping, device, dtype)
        fuse_gates(self.layers, self.sweeping, device, dtype)
        fuse_rectifiers(self, device, dtype)
        for root in (self.module, *self.layers):
            for module in root.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)
                # Sums and the like are in modules with parameters, so that little else of a layer must be looked at.
                is_computing = root is not self.module and (module is root or bool(module._parameters))
                if isinstance(self.sweeping.arithmetic, BatchInvariant) and (
                    is_computing or type(module) in (nn.Linear, nn.LayerNorm)
                ):
                    self.sweeping.arithmetic.attach(module)

    def put_buffer(self, name: str, values: torch.Tensor) -> None:
        """Fill a persistent buffer of the model or of one of its layers."""
        self.buffer(name).copy_(values)

    def buffer(self, name: str) -> torch.Tensor:
        """A persistent buffer of the model or of one of its layers."""
        module, attribute = self._buffer_owners[name]
        buffer: torch.Tensor | None = module._buffers[attribute]
        assert buffer is not None
        return buffer

    @property
    def vocab_size(self) -> int:
        """The number of rows of the head."""
        return int(self.state[self.embedding_name].shape[0])

    @property
    def hidden_size(self) -> int:
        """The number of elements of a row's hidden states between layers."""
        streams = self.recorder.streams
        return streams.width if streams.are_several else int(self.config.get_text_config().hidden_size)

    @property
    def embedding_name(self) -> str:
        """The full name of the token embedding's weight."""
        return next(iter(self.units[0].owners))

    @property
    def is_plain(self) -> bool:
        """Whether attention is a plain softmax over all earlier tokens, which the engine's own kernels support."""
        return self.sweeping.is_plain and not self.is_padded

    @property
    def state_shapes(self) -> list[StateShape | None]:
        """The states that layers keep, by layer; None for a layer without one, or of another stage."""
        mixers = {index: mixer for index, mixer in self.mixers.items() if index in self.held}
        return [mixers[index].shape if index in mixers else None for index in range(len(self.layers))]

    @property
    def has_head(self) -> bool:
        """Whether this process computes logits: it has the last layer."""
        return self.held.stop == len(self.layers)

    @property
    def is_in_stages(self) -> bool:
        """Whether other processes compute some of the layers."""
        return len(self.held) < len(self.layers)

    @property
    def continues(self) -> bool:
        """Whether all layers can process several tokens that continue cached ones."""
        return all(mixer.continues for mixer in self.mixers.values())

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs of linear layers are rounded to 8 bits, as some checkpoints require."""
        return any("rounds_inputs" in module.__dict__ for layer in self.layers for module in layer.modules())

    @property
    def reads_in_place(self) -> bool:
        """Whether attention always reads keys and values in place on the device (`Flash.can`)."""
        sizes = {(shape.key_dim, shape.value_dim) for shape in self.kv_shapes if shape.width}
        has_kernels = all(flash.has_kernels(self.device, self.dtype, *size) for size in sizes)
        return has_kernels and self.is_plain

    def _find_units(self) -> list[Unit]:
        layer_of: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if layer_of.setdefault(id(module), index) != index and any(True for _ in module.parameters()):
                    raise UnsupportedError(
                        f"{self._family}: layers {layer_of[id(module)]} and {index} share a {type(module).__name__}; "
                        "every layer needs weights of its own here"
                    )
        units = {name: Unit(name, {}) for name in ("embedding", "outer")}
        units.update({f"layer.{index}": Unit(f"layer.{index}", {}) for index in range(len(self.layers))})
        units["head"] = Unit("head", {})
        for prefix, module in self.module.named_modules():
            for attribute in module._parameters:
                if module._parameters[attribute] is None:
                    continue
                is_tied_head = self.is_tied and module is self.output
                if is_tied_head and attribute == "weight":
                    continue
                if id(module) in layer_of:
                    unit = f"layer.{layer_of[id(module)]}"
                elif module is self.embedding:
                    unit = "embedding"
                else:
                    unit = "head" if module is self.output and not is_tied_head else "outer"
                units[unit].owners[f"{prefix}.{attribute}" if prefix else attribute] = module, attribute
        if len(units["embedding"].owners) != 1:
            raise UnsupportedError(f"{type(self.module).__name__}: its token embedding is not one table")
        return list(units.values())

    def _leave_out(self, unused: set[str]) -> None:
        """Exclude parameters that no text is computed with from placement and loading."""
        outer = self.units[1]
        self.units[1] = Unit("outer", {name: owner for name, owner in outer.owners.items() if name not in unused})
        for name in unused:
            del self.state[name]

    def _find_packed(self, path: Path, has_weights: bool) -> dict[str, PackedParameter]:
        if not self.quantization:
            return {}
        if not has_weights:
            checked_method(path, self.quantization)
            return {}
        owners = {name: at[0] for unit in self.units if unit.name != "outer" for name, at in unit.owners.items()}
        return find_packed(path, self.quantization, owners, self.names)

    def record(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed a micro-batch, embedding and outer parameters bound: hidden `[rows, width]`, and each layer's call."""
        return self.outer.record(inputs)

    @torch.no_grad()
    def layer(self, index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Run one layer: hidden `[rows, width]` -> `[rows, width]`; its parameters must be bound."""
        args, kwargs = call.given()
        return call.streams.flat(call.states_of(self.layers[index](call.laid_out(hidden), *args, **kwargs)))

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head: hidden `[rows, width]` of the last layer -> float32 logits `[rows, vocabulary]`."""
        logits: torch.Tensor = self._behind_layers(hidden, self.module).logits.flatten(0, 1)
        return logits.float()

    @torch.no_grad()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm alone: hidden `[rows, width]` of the last layer -> `[rows, width]`, which the head is given."""
        normed: torch.Tensor = self._behind_layers(hidden, self.outer.called)[0].flatten(0, 1)
        return normed

    def _behind_layers(self, hidden: torch.Tensor, forward: Callable[..., Any]) -> Any:
        """The output of the model's own forward for `hidden` `[rows, width]` in the place of its layers' output."""
        # Sequences of one row where positions are counted: there are no more than a sequence may have.
        shape = (len(hidden), 1) if self.outer.positions.is_counted else (1, len(hidden))
        positions = torch.zeros(shape, dtype=torch.long, device=self.device)
        # Something must be embedded; the injected states take its place after the layers.
        width = self.state[self.embedding_name].shape[1]
        inputs = torch.zeros(*shape, width, dtype=self.dtype, device=self.device)
        self.recorder.inject = hidden.unflatten(0, shape)
        try:
            given = {"position_ids": positions} if "position_ids" in self.outer.names else {}
            with self.embedding_as(lambda ids: inputs):
                return forward(input_ids=positions, use_cache=False, **given)
        finally:
            self.recorder.inject = None

    @contextmanager
    def embedding_as(self, look_up: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Inside, the token embedding returns what `look_up` makes of ids; it needs no weights then."""
        self.embedding.__dict__["forward"] = look_up
        try:
            yield
        finally:
            del self.embedding.__dict__["forward"]

    @property
    def _family(self) -> str:
        return f"{type(self.module).__name__} ({self.config.model_type})"
