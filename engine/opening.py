"""Opens a model: from a model directory and a policy to everything that the sweep loop works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from engine.cache.encodable import check_encodable
from engine.cache.hidden import HiddenStates
from engine.cache.joint_room import JointRoom
from engine.cache.key_value import KVCache
from engine.cache.state import StateCache
from engine.checkpoint.description import ModelDescription
from engine.checkpoint.tokenizer import SpecialTokens, load_tokenizer, special_tokens
from engine.drafting.opened import DraftModel, OpenedDraft, open_draft
from engine.errors import CapacityError, EngineError, UnsupportedError, named, one_line
from engine.executor import Executor
from engine.kernels.codec import codec_of
from engine.kernels.threads import limit_threads, one_thread
from engine.kernels.weight_codes.named import weight_codec_of
from engine.member import Member
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.model.causal_model import CausalModel
from engine.planning.hardware import available_memory, resolve_device, resolve_dtype
from engine.planning.planner import Plan, make_plan
from engine.planning.sharing import ALONE, Sharing
from engine.policy import Policy, only_bfloat16
from engine.schedule.scheduler import Scheduler
from engine.schedule.segment import add_drafts
from engine.stages.division import divide
from engine.stages.holding import hold
from engine.stages.lane import Lane
from engine.stages.line import StageLine
from engine.text.decoding import Text
from engine.weights.encoded.filling import Fill
from engine.weights.encoded.left_plain import left_plain
from engine.weights.loading import check_checkpoint
from engine.weights.members.group import Group
from engine.weights.store import WeightStore
from engine.weights.stored_form import shape_of
from engine.weights.stream import WeightStream


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model opened under a policy: everything that the sweep loop works with."""

    policy: Policy
    path: Path
    """The model's directory; it may no longer exist if weights do not come from it."""
    plan: Plan
    model: CausalModel
    weights: WeightStore
    stream: WeightStream
    lanes: tuple[Lane[Executor], ...]
    """Lanes, whose sweeps are in flight at the same time; one, unless the model's layers are in stages."""
    arena: Arena
    group: Group | None
    """The engines that compute each sweep together with this one."""
    line: StageLine | None
    """The connection to the model's other stages, if this process is one of several."""
    tokenizer: PreTrainedTokenizerBase
    text: Text
    window: int | None
    """Most positions of a sequence; None if the model sets no limit."""
    pad_token: int
    draft: OpenedDraft | None
    """The draft model, if the policy names one."""
    loading: Iterator[None]
    """Loads one parameter at each step; sweeps wait for parameters that are not loaded yet."""
    opened: ExitStack
    """Everything that `close` closes."""

    def close(self) -> None:
        """Free page-locked memory and offload files; no sweep may be in progress."""
        self.opened.close()


def open_parts(description: ModelDescription, policy: Policy, fill: Fill, member: Member | None = None) -> Parts:
    """Open the described model; `fill` loads its weights; `member` says which of several engines this is.

    Raises `ConfigError`, `CheckpointError`, `UnsupportedError`, or `CapacityError` if the policy does not fit the
    available memory.
    """
    limit_threads()
    device_name = resolve_device(policy.device)
    device = accelerator.indexed(torch.device(device_name))
    dtype_name = resolve_dtype(policy.dtype, description.dtype, device_name)
    dtype = getattr(torch, dtype_name)
    model, tokenizer, special = _open_model(description, policy, dtype, device)
    _check_weight_dtype(policy, dtype_name)
    if member is None:
        memory = available_memory(device_name, policy.gpu_memory, policy.cpu_memory, policy.offload_dir)
        sharing = ALONE
    else:
        memory, sharing = member.memory, Sharing(count=member.count, gather=member.gather, stages=member.stages)
    is_lossless = policy.compress_weight == "lossless"
    plain = left_plain(Path(description.path), model) if is_lossless and description.weight_bytes else frozenset[str]()
    codec, cache_codec = weight_codec_of(policy.compress_weight, plain), codec_of(policy.compress_cache)
    shape, on_cpu = shape_of(model, codec, cache_codec), device.type == "cpu"
    divided = None
    if member is not None and member.stages:
        divided = divide(model, Path(description.path), shape, member.count, cache_codec)
        shape = divided.shape
        hold(model, divided.layers[member.stage])
    drafting = _draft_model(description, policy, model, tokenizer)
    draft_shape = None if drafting is None else shape_of(drafting.model)
    plan = make_plan(shape, policy, memory, on_cpu=on_cpu, sharing=sharing, draft=draft_shape)
    with ExitStack() as opened:
        try:
            if policy.gpu_memory is not None:
                opened.callback(accelerator.limit_memory(device, policy.gpu_memory))
            opened.callback(accelerator.release_memory, device)
            arena = opened.enter_context(closing(Arena(device, pin=policy.pin_weight, offload_dir=policy.offload_dir)))
            if plan.uses_disk:
                arena.check_offload_dir()
            sharer = None if divided is not None else member
            whole = plan.expands_whole
            store = WeightStore(model, plan.weights, arena, codec=codec, member=sharer, expands_whole=whole)
            opened.callback(store.close)
            loading = fill(store)
            store.claim_disk()
            group = line = draft = None
            if sharer is not None and sharer.gather:
                group = opened.enter_context(closing(Group(sharer, device)))
            if member is not None and divided is not None:
                line = StageLine(member, device, model.hidden_size, model.hidden_dtype, sharing.num_lanes)
                opened.callback(line.close)
            stream = WeightStream(
                store,
                group,
                overlap=policy.overlap,
                read_ahead_bytes=plan.read_ahead_bytes,
                experts_apart=plan.experts_apart,
            )
            opened.callback(stream.close)
            if drafting is not None and plan.draft is not None:
                draft = opened.enter_context(closing(open_draft(drafting, model, plan.draft, arena, Executor)))
                loading = _one_after_the_other(draft.loading, loading)
            hidden = HiddenStates(arena, plan.activations, model.hidden_size, model.hidden_dtype)
            lanes = []
            for number in range(sharing.num_lanes):
                cache = KVCache(
                    model.kv_shapes,
                    dtype,
                    arena,
                    {tier: size // sharing.num_lanes for tier, size in plan.cache_budgets.items()},
                    plan.kv_cache,
                    codec=cache_codec,
                    compute_on_host=policy.cpu_cache_compute,
                    counted=None if divided is None else divided.row_bytes,
                )
                states = StateCache(
                    model.state_shapes,
                    arena,
                    cache.room.budgets,
                    plan.kv_cache,
                    counted=None if divided is None else divided.slot_bytes,
                )
                room = JointRoom(cache.room, states.room) if model.mixers else cache.room
                executor = Executor(model, stream, cache, states, hidden, plan.limits, line, number)
                if draft is not None:
                    draft.follow(executor)
                opened.callback(executor.close)
                scheduler = Scheduler(
                    plan.limits,
                    room,
                    share_prefix=policy.share_prefix,
                    drafts=add_drafts if draft is None else draft.drafts.add,
                )
                lane = Lane(
                    number=number,
                    line=line,
                    cache=cache,
                    states=states,
                    room=room,
                    scheduler=scheduler,
                    executor=executor,
                )
                lanes.append(lane)
            return Parts(
                policy=policy,
                path=Path(description.path),
                plan=plan,
                model=model,
                weights=store,
                stream=stream,
                lanes=tuple(lanes),
                arena=arena,
                group=group,
                line=line,
                tokenizer=tokenizer,
                text=Text(tokenizer, frozenset(special.end_of_text)),
                window=None if description.window is None else description.window - model.outer.positions.offset,
                pad_token=[*special.padding, *special.end_of_text, 0][0],
                draft=draft,
                loading=loading,
                opened=opened.pop_all(),
            )
        except BaseException as error:
            raise explained(error, policy) from error


def check_model(description: ModelDescription, policy: Policy) -> None:
    """Raise what `open_parts` would raise for the model itself on any machine; reads no weights.

    Of a model without downloaded weight files, only what its other files say is checked.
    """
    has_weights = description.weight_bytes > 0
    cpu = torch.device("cpu")
    model, tokenizer, _ = _open_model(description, policy, torch.float32, cpu, has_weights=has_weights)
    if policy.dtype != "auto":  # auto is another dtype on each kind of device
        _check_weight_dtype(policy, policy.dtype)
    if policy.stages > 1:
        divide(model, Path(description.path), shape_of(model), policy.stages, None)
    if has_weights:
        check_checkpoint(Path(description.path), model)
    if (draft := _draft_model(description, policy, model, tokenizer)) is not None:
        draft.check_weights()


def _draft_model(
    description: ModelDescription, policy: Policy, model: CausalModel, tokenizer: PreTrainedTokenizerBase
) -> DraftModel | None:
    """Return the policy's draft model, without weights, if it names one; raises if it cannot draft for `model`."""
    return None if policy.draft_model is None else DraftModel.of(policy.draft_model, description, model, tokenizer)


def _one_after_the_other(*steps: Iterator[None]) -> Iterator[None]:
    """Chain the steps of several iterators, one iterator after the other."""
    for each in steps:
        yield from each


def _open_model(
    description: ModelDescription,
    policy: Policy,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_weights: bool = True,
) -> tuple[CausalModel, PreTrainedTokenizerBase, SpecialTokens]:
    """Build the described model without weights, and its tokenizer; raises if it cannot run under the policy."""
    policy.check_window(description.window)
    path = Path(description.path)
    tokenizer = load_tokenizer(path)
    with one_thread():  # its modules are tried with a few rows
        model = CausalModel(path, dtype, device, batch_invariant=policy.batch_invariant, has_weights=has_weights)
    special = special_tokens(path, model.config, tokenizer)
    if policy.compress_cache:
        check_encodable(model.kv_shapes, model.dtype, {at: each.dtype for at, each in model.indexers.items()})
    if policy.compress_weight and model.quantization:
        raise UnsupportedError(f"compress-weight: {path} is already quantized; leave compress-weight out")
    return model, tokenizer, special


def _check_weight_dtype(policy: Policy, dtype: str) -> None:
    if policy.compress_weight == "lossless" and dtype != "bfloat16":
        raise UnsupportedError(only_bfloat16(dtype))


def explained(error: BaseException, policy: Policy) -> BaseException:
    """Convert `error` to a one-line error of the engine, unless it is one or ends the process."""
    if accelerator.is_out_of_memory(error):
        what = one_line(error)
        reason = what[max(0, what.find("DefaultCPUAllocator")) :].split(". ")[0]
        return CapacityError(
            f"the device ran out of memory ({reason}); lower gpu-batch-size"
            f"{'' if policy.gpu_batch_size is None else f' {policy.gpu_batch_size}'} or the gpu percents"
        )
    if isinstance(error, EngineError | KeyboardInterrupt | SystemExit):
        return error
    return EngineError(f"the engine failed: {named(error)}")
