"""The engine: loads a model by a policy, takes jobs from any thread, and serves them together, sweep by sweep."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from engine.cache.hidden import HiddenStates
from engine.cache.key_value import KVCache, unencodable_layer
from engine.call import Call, Finished, LoopResults, Result, Results
from engine.checkpoint.files import ModelDescription, describe
from engine.completion import Text, advance, completion_of
from engine.errors import CapacityError, CheckpointError, EngineError, JobError, NumericsError, UnsupportedError
from engine.executor import Executor
from engine.generation import Generation, Settings, jobs_of, prompts_of, rows_of, sequences_of
from engine.job import Completion, Job, is_whole
from engine.kernels.codec import GROUP, Codec, codec_of
from engine.memory import accelerator
from engine.memory.arena import Arena
from engine.memory.layout import Tier
from engine.model.causal_model import CausalModel
from engine.planning.hardware import available_memory, resolve_device, resolve_dtype
from engine.planning.planner import ModelShape, Plan, make_plan
from engine.policy import Policy
from engine.schedule.scheduler import Scheduler
from engine.schedule.sequence import Sequence
from engine.schedule.timing import SweepTiming, count_rows
from engine.weights.kept import KeptWeights
from engine.weights.loading import load_checkpoint
from engine.weights.store import WeightStore
from engine.weights.stored_form import encoded_names, stored_sizes, whole_sizes


class Engine:
    """Runs jobs through a causal language model that may be larger than the device.

    Calls from several threads are served together: jobs that arrive while a sweep runs join the next one. A context
    manager; `close` frees page-locked memory and offload files.
    """

    def __init__(
        self,
        model: CausalModel,
        weights: WeightStore,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: Policy,
        plan: Plan,
        window: int | None,
        end_of_text: frozenset[int],
        pad_token: int,
        arena: Arena,
        loading: Iterator[None],
    ) -> None:
        self.tokenizer = tokenizer
        self.policy = policy
        self.plan = plan
        self.window = window
        """Most positions of a sequence; None when the model sets no limit."""
        self.observer: Callable[[SweepTiming], None] | None = None
        """Called in the engine's thread after each sweep, before its completions are delivered; must be quick."""
        self._model = model
        self._weights = weights
        self._scheduler = scheduler
        self._executor = executor
        self._arena = arena
        self._text = Text(tokenizer, end_of_text)
        self._pad_token = pad_token
        self._owner: dict[int, tuple[Call, int]] = {}
        self._inbox: list[tuple[Call, dict[int, Sequence]]] = []
        self._abandoned: list[Call] = []
        self._changed = threading.Condition()
        self._closing = False
        self._loaded = math.inf
        """When all weights were in place, by `time.perf_counter`."""
        self._fault: BaseException | None = None
        self._worker = threading.Thread(target=self._serve, name="flexgen-engine", daemon=True)
        self._loader = threading.Thread(target=self._load, args=(loading,), name="flexgen-load", daemon=True)
        self._loader.start()
        self._worker.start()

    @classmethod
    def from_pretrained(cls, model: str, policy: Policy | str | Path | Mapping[str, Any] = "auto") -> Engine:
        """Load `model`, a hub id or directory, as `policy` says.

        policy: the name of a shipped one, a YAML file, a mapping, or "auto". Raises `ConfigError`, `CheckpointError`,
        `UnsupportedError`, or `CapacityError` when the policy does not fit the memory at hand. Returns when the
        checkpoint is known to fit the model; its weights are read while the first jobs run.
        """
        policy = Policy.load(policy)
        description = describe(model)
        path = Path(description.path)
        bits = policy.compress_weight

        def fill(store: WeightStore) -> Iterator[None]:
            return load_checkpoint(path, store, KeptWeights(path, store, bits) if bits and store.has_codes else None)

        return cls.open(description, policy, fill)

    @classmethod
    def open(
        cls, description: ModelDescription, policy: Policy, fill: Callable[[WeightStore], Iterator[None]]
    ) -> Engine:
        """Open the described model with weights that `fill` puts in place (benchmarks fill random ones).

        What `fill` returns is iterated in the background while the first sweep runs, and waits where it must.
        """
        device_name = resolve_device(policy.device)
        device = accelerator.indexed(torch.device(device_name))
        dtype = getattr(torch, resolve_dtype(policy.dtype, description.dtype, device_name))
        path = Path(description.path)
        tokenizer = load_tokenizer(path)
        model = CausalModel(path, dtype, device)
        end_of_text = _special_token("eos_token_id", path, model, tokenizer)
        memory = available_memory(device_name, policy.gpu_memory, policy.cpu_memory, policy.offload_dir)
        codec, cache_codec = codec_of(policy.compress_weight), codec_of(policy.compress_cache)
        if cache_codec is not None:
            _check_cache_codec(model)
        if codec is not None and model.packed:
            raise UnsupportedError(f"compress-weight: {path} comes quantized already; leave it out")
        plan = make_plan(shape_of(model, codec, cache_codec), policy, memory, on_cpu=device.type == "cpu")
        if policy.gpu_memory is not None:
            accelerator.limit_memory(device, policy.gpu_memory)
        arena = Arena(device, pin=policy.pin_weight, offload_dir=policy.offload_dir)
        store = None
        try:
            if plan.uses_disk:
                arena.check_offload_dir()
            store = WeightStore(
                model,
                plan.weights,
                arena,
                codec=codec,
                overlap=policy.overlap,
                read_ahead_bytes=plan.read_ahead_bytes,
            )
            loading = fill(store)
            store.claim_disk()
            cache = KVCache(
                model.kv_shapes,
                dtype,
                arena,
                plan.cache_budgets,
                plan.kv_cache,
                codec=cache_codec,
                compute_on_host=policy.cpu_cache_compute,
            )
            hidden = HiddenStates(arena, plan.activations, model.hidden_size, dtype)
            return cls(
                model,
                store,
                Scheduler(plan.limits, cache, share_prefix=policy.share_prefix),
                Executor(model, store, cache, hidden, plan.limits),
                tokenizer,
                policy=policy,
                plan=plan,
                window=description.window,
                end_of_text=frozenset(end_of_text),
                pad_token=[*_special_token("pad_token_id", path, model, tokenizer), *end_of_text, 0][0],
                arena=arena,
                loading=loading,
            )
        except BaseException as error:
            if store is not None:
                store.close()
            arena.close()
            accelerator.limit_memory(device, None)
            raise _explain(error, policy) from error

    def run(self, jobs: Iterable[Job]) -> list[Completion]:
        """Run `jobs` and return their completions in the same order."""
        jobs = list(jobs)
        completions: list[Completion | None] = [None] * len(jobs)
        for index, completion in self.stream(jobs):
            completions[index] = completion
        assert all(completion is not None for completion in completions)
        return [completion for completion in completions if completion is not None]

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Completion]]:
        """Yield (position in `jobs`, completion), each as soon as its sweep ends.

        A bad job fails in its own `Completion.error`; raises `EngineError` only for faults of the engine. Jobs of a
        generator that is closed early are dropped.
        """
        sweeps = self.sweeps(jobs)  # here, not in the generator: jobs are submitted when this is called
        return self._flattened(sweeps)

    def sweeps(self, jobs: Iterable[Job]) -> Generator[Finished, None, None]:
        """`stream`, but yield all completions of a sweep at once, as soon as it ends (for one transaction a sweep)."""
        results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        call, bad = self._call(jobs, results)
        sweeps = self._results(call, results, bad, len(call.sequences))
        next(sweeps)  # into its `try`, so that closing it drops the jobs even before the first result is taken
        self._submit(call)
        return sweeps

    async def astream(self, jobs: Iterable[Job]) -> AsyncIterator[tuple[int, Completion]]:
        """`stream` for a coroutine: `async for index, completion in engine.astream(jobs)`, in a running asyncio loop.

        Jobs are submitted when the first result is awaited, and dropped when the generator is closed or its task is
        cancelled. Calls of several tasks are served together.
        """
        results = LoopResults()
        call, bad = self._call(jobs, results)
        num_running = len(call.sequences)
        try:
            self._submit(call)
            for index, completion in bad:
                yield index, completion
            while num_running:
                result = await results.get()
                if isinstance(result, BaseException):
                    raise result
                num_running -= len(result)
                for index, completion in result:
                    yield index, completion
        finally:
            self._abandon(call)

    @overload
    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = ...,
        *,
        return_dict: Literal[False] = ...,
        **settings: Unpack[Settings],
    ) -> torch.Tensor: ...

    @overload
    def generate(
        self, input_ids: Any, attention_mask: Any = ..., *, return_dict: Literal[True], **settings: Unpack[Settings]
    ) -> Generation: ...

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        stop: str | Iterable[str | Iterable[int]] | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        pad_token_id: int | None = None,
        return_dict: bool = False,
    ) -> torch.Tensor | Generation:
        """Continue prompts, as `transformers.GenerationMixin.generate` does; names and defaults are its.

        input_ids: token ids, a tensor or array `[prompts, length]` or `[length]`, or lists of any lengths.
        attention_mask: of the same form; tokens with a 0 are padding, on whichever side.
        temperature, top_k, top_p: only with `do_sample`; None or 0 as top_k samples among all tokens.
        stop: a string, or strings or lists of token ids; a row ends before it
            (transformers' `stop_strings` keeps it).
        num_return_sequences: completions of each prompt, neighbours in the result; needs `do_sample` to differ.
        seed: the same gives the same samples; completion i of all gets seed + i. None draws them.
        pad_token_id: fills rows up to the longest; None: the model's, else its end-of-text.

        Returns int64 `[prompts * num_return_sequences, longest]` on the CPU: the row as given, the new tokens with
        end-of-text if it came, padding; with `return_dict`, a `Generation`. Raises `JobError`, before anything is
        computed, for a prompt that cannot be served, and when one fails.
        """
        pad = self._pad_token if pad_token_id is None else pad_token_id
        if not is_whole(pad) or not -(2**63) <= pad < 2**63:
            raise JobError(f"pad_token_id {pad} is no token id")
        rows = rows_of(input_ids)
        jobs = jobs_of(
            prompts_of(rows, attention_mask),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            num_return_sequences=num_return_sequences,
            seed=seed,
        )
        for number, job in enumerate(jobs):
            try:
                self._check(job)
            except JobError as error:
                raise JobError(f"row {number // num_return_sequences} of input_ids: {error}") from None
        completions = self.run(jobs)
        for number, done in enumerate(completions):
            if done.error is not None:
                raise type(done.error)(
                    f"row {number // num_return_sequences} of input_ids: {done.error}"
                ) from done.error
        whole = [row for row in rows for _ in range(num_return_sequences)]
        sequences = sequences_of(whole, completions, int(pad))
        return Generation(sequences=sequences, completions=tuple(completions)) if return_dict else sequences

    def _call(self, jobs: Iterable[Job], results: Results) -> tuple[Call, list[tuple[int, Completion]]]:
        """The call of what can run of `jobs`, and the completions of what cannot."""
        call, bad = Call(results), []
        for index, job in enumerate(jobs):
            try:
                self._check(job)
                call.sequences[index] = Sequence.of(job)
            except EngineError as error:
                bad.append((index, Completion(error=error)))
        return call, bad

    def _results(
        self,
        call: Call,
        results: queue.SimpleQueue[Result],
        bad: list[tuple[int, Completion]],
        num_running: int,
    ) -> Generator[Finished, None, None]:
        try:
            yield []
            if bad:
                yield bad
            while num_running:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                num_running -= len(result)
                yield result
        finally:
            self._abandon(call)

    @staticmethod
    def _flattened(sweeps: Generator[Finished, None, None]) -> Iterator[tuple[int, Completion]]:
        with closing(sweeps):
            for finished in sweeps:
                yield from finished

    def _abandon(self, call: Call) -> None:
        """Drop what of `call` has not ended."""
        if not call.sequences:
            return
        with self._changed:
            self._abandoned.append(call)
            self._changed.notify_all()

    @property
    def num_sweeps(self) -> int:
        """Passes over the weights so far."""
        return self._executor.num_sweeps

    def placed_bytes(self) -> dict[Tier, int]:
        """Bytes held on each tier now: weights, slots and staging, KV cache, activations off the device.

        Weights on disk count, too, where they are read from the checkpoint itself.
        """
        held = dict(self._arena.num_bytes)
        return {**held, "disk": held["disk"] + self._weights.adopted_bytes}

    def close(self) -> None:
        """Stop serving and free page-locked memory and offload files; waiting calls fail."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._weights.give_up(EngineError("the engine was closed before all weights were in place"))
        self._loader.join()
        self._worker.join()
        self._weights.close()
        self._executor.close()
        self._arena.close()
        accelerator.release_memory(self._arena.device)
        accelerator.limit_memory(self._arena.device, None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, job: Job) -> None:
        job.check()
        vocabulary = self._model.vocab_size
        if {*map(type, job.prompt)} != {int}:  # else there is nothing to look for, token by token
            strange = next((token for token in job.prompt if not is_whole(token)), None)
            if strange is not None:
                raise JobError(f"the prompt holds {strange!r}, which is no token id")
        if not 0 <= min(job.prompt) <= max(job.prompt) < vocabulary:
            outside = next(token for token in job.prompt if not 0 <= token < vocabulary)
            raise JobError(
                f"prompt token {outside} is outside the model's vocabulary of {vocabulary}; the tokenizer and the "
                "model do not belong together, use the tokenizer that the model was trained with"
            )
        rows = max(1, len(job.prompt) - (job.max_new_tokens == 0))  # the last token of all is never fed
        positions = rows + max(0, job.max_new_tokens - 1)
        if self.window is not None and positions > self.window:
            raise JobError(
                f"prompt of {len(job.prompt)} tokens + {job.max_new_tokens} new ones exceed the model's window of "
                f"{self.window}; shorten it"
            )
        pad = self.policy.pad_to_seq_len
        if isinstance(pad, int) and rows > pad:
            raise JobError(f"prompt of {len(job.prompt)} tokens is longer than pad-to-seq-len {pad}; raise it")

    def _submit(self, call: Call) -> None:
        with self._changed:
            if self._fault is not None:
                raise self._fault.with_traceback(None)  # else it would grow, and keep frames, with every call
            if self._closing:
                raise EngineError("the engine is closed")
            if call.sequences:
                self._inbox.append((call, call.sequences))
                self._changed.notify_all()

    def wait_until_loaded(self) -> None:
        """Return when all weights are in place; raises `EngineError` if they cannot be. Jobs need not wait for it."""
        self._weights.wait()

    def _load(self, loading: Iterator[None]) -> None:
        try:
            for _ in loading:
                if self._closing:
                    return
            self._loaded = time.perf_counter()
        except BaseException as error:
            self._weights.give_up(_explain(error, self.policy))

    def _serve(self) -> None:
        try:
            while self._receive():
                self._step()
        except BaseException as error:
            self._fault = _explain(error, self.policy)
        finally:
            with self._changed:
                calls = {id(call): call for call, _ in [*self._owner.values(), *self._inbox]}
                self._inbox.clear()
            for call in calls.values():
                call.results.put(self._fault or EngineError("the engine was closed while this job was waiting"))

    def _receive(self) -> bool:
        """Take in what arrived; wait when there is nothing to do. False when the engine closes."""
        with self._changed:
            while self._scheduler.is_idle and not self._inbox and not self._closing:
                self._changed.wait()
            if self._closing:
                return False
            inbox, self._inbox = self._inbox, []
            abandoned, self._abandoned = self._abandoned, []
        for call, sequences in inbox:  # all of them before anything can fail: a fault is told to the owners
            self._owner.update({id(sequence): (call, index) for index, sequence in sequences.items()})
        for _, sequences in inbox:
            self._scheduler.add(sequences.values())
        for call in abandoned:
            left = [sequence for sequence in call.sequences.values() if id(sequence) in self._owner]
            for sequence in left:
                del self._owner[id(sequence)]
            if left:
                self._scheduler.drop(left)
        return True

    def _step(self) -> None:
        begun = time.perf_counter()
        batches = self._scheduler.next_sweep()
        self._deliver([(sequence, self._completion_of(sequence)) for sequence in self._scheduler.take_failed()])
        if not batches:
            return
        num_sequences = len(self._scheduler.running)
        scheduled = time.perf_counter()
        self._executor.sweep(batches, self._advance)
        swept = time.perf_counter()
        done, suspects = [], []
        for sequence in self._scheduler.running:
            if not sequence.saw_only_numbers:
                if not sequence.is_alone:
                    suspects.append(sequence)
                    continue
                sequence.error = NumericsError(
                    f"the model's logits for this prompt are not finite in {self._model.dtype}; "
                    "take a dtype with a wider range (bfloat16, float32), or check the weights"
                )
            elif sequence.job.max_new_tokens == 0:
                sequence.finish_reason = "length"
            if sequence.is_done:
                done.append((sequence, self._completion_of(sequence)))
        self._scheduler.finish(sequence for sequence, _ in done)
        self._scheduler.isolate(suspects)
        if self.observer is not None:
            prefill_rows, decode_rows = count_rows(batches)
            self.observer(
                SweepTiming(
                    begun=begun,
                    host_s=scheduled - begun + time.perf_counter() - swept,
                    load_s=max(0.0, min(swept, self._loaded) - scheduled),
                    sweep_s=swept - scheduled,
                    prefill_rows=prefill_rows,
                    decode_rows=decode_rows,
                    num_sequences=num_sequences,
                )
            )
        self._deliver(done)  # last: whoever sees the result finds the room free

    def _advance(self, sequence: Sequence, token: int, logprob: float) -> None:
        try:
            advance(sequence, token, logprob, self._text)
        except Exception as error:  # tokenizers raise whatever they meet
            sequence.error = self._unreadable(sequence, error)

    def _completion_of(self, sequence: Sequence) -> Completion:
        try:
            return completion_of(sequence, self._text)
        except Exception as error:
            return Completion(error=self._unreadable(sequence, error))

    def _deliver(self, done: Iterable[tuple[Sequence, Completion]]) -> None:
        finished: dict[int, tuple[Call, Finished]] = {}
        for sequence, completion in done:
            call, index = self._owner.pop(id(sequence))
            call.sequences.pop(index)
            finished.setdefault(id(call), (call, []))[1].append((index, completion))
        for call, results in finished.values():
            call.results.put(results)

    def _unreadable(self, sequence: Sequence, error: Exception) -> JobError:
        """The error of a sequence whose tokens cannot be decoded; raises `error` again if it came from elsewhere."""
        generated = sequence.generated
        bad = [token for token in dict.fromkeys(generated) if not self._is_readable([token])]
        if not bad and self._is_readable(generated):
            raise error
        named = ", ".join(map(str, (bad or generated)[:10])) + (" ..." if len(bad or generated) > 10 else "")
        return JobError(
            f"the tokenizer cannot decode generated token ids {named} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); the tokenizer and the model do not belong together, use the "
            "tokenizer that the model was trained with"
        )

    def _is_readable(self, tokens: list[int]) -> bool:
        try:
            self._text.decode(tokens)
        except Exception:
            return False
        return True


_SCORE_COPIES = 3
"""Scores, position biases and weights of an attention that transformers computes eagerly, in float32."""


def shape_of(model: CausalModel, codec: Codec | None = None, cache_codec: Codec | None = None) -> ModelShape:
    """Sizes that the planner needs, with weights kept as `codec` has them, keys and values as `cache_codec` has."""
    config = model.config.get_text_config()
    sizes = {unit.name: sum(stored_sizes(model, unit, codec).values()) for unit in model.units}
    coded = [unit for unit in model.units if encoded_names(model, unit, codec)]
    whole = {unit.name: sum(whole_sizes(model, unit).values()) for unit in coded}
    layers = tuple(size for name, size in sizes.items() if name.startswith("layer."))
    head = sizes["embedding"] if model.is_tied else sizes["head"]
    inner = next(
        (getattr(config, key) for key in ("intermediate_size", "ffn_dim", "n_inner") if getattr(config, key, None)),
        4 * model.hidden_size,
    )
    experts = getattr(config, "num_experts_per_tok", None) or 1
    heads = config.num_attention_heads
    widest = max(model.kv_shapes, key=lambda shape: shape.width)
    attention = heads * (2 * widest.key_dim + 2 * widest.value_dim)
    item = model.dtype.itemsize
    return ModelShape(
        unit_bytes=(*layers, head),
        # Half bytes of a matrix are spread over whole ones before they become numbers.
        expanded_bytes=max(whole.values(), default=0) * 3 // 2,
        stored_part=1.0 if not whole else sum(sizes[name] for name in whole) / sum(whole.values()),
        embedding_bytes=0 if model.is_tied else sizes["embedding"],
        outer_bytes=sizes["outer"],
        cache_row_bytes=sum(shape.width for shape in model.kv_shapes) * item,
        cache_layer_row_bytes=widest.width * item,
        coded_layer_row_bytes=0 if cache_codec is None else cache_codec.row_bytes(widest.width, model.dtype),
        hidden_row_bytes=model.hidden_size * item,
        is_padded=model.is_padded,
        score_bytes=_SCORE_COPIES * heads * 4 if model.is_padded else 0,
        is_plain=model.is_plain,
        reads_in_place=model.reads_in_place,
        work_row_bytes=item * (6 * model.hidden_size + 3 * inner * experts + 2 * attention),
    )


def _check_cache_codec(model: CausalModel) -> None:
    layer = unencodable_layer(model.kv_shapes)
    if layer is not None:
        raise UnsupportedError(
            f"compress-cache: keys and values of layer {layer} are {model.kv_shapes[layer].width} numbers a token, no "
            f"multiple of {GROUP}; leave it out"
        )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; `CheckpointError` if it cannot be loaded."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return tokenizer


def _special_token(name: str, path: Path, model: CausalModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a special token such as "eos_token_id", as `transformers`' generate finds them; empty if there is none."""
    ids: Any = None
    if (path / "generation_config.json").is_file():
        ids = getattr(GenerationConfig.from_pretrained(path), name)
    if ids is None:
        ids = getattr(model.config.get_text_config(), name, None)
    if ids is None:
        ids = getattr(tokenizer, name)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _explain(error: BaseException, policy: Policy) -> BaseException:
    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).split(". ")[0]
        return CapacityError(
            f"the device ran out of memory ({' '.join(reason.split())}); lower gpu-batch-size"
            f"{'' if policy.gpu_batch_size is None else f' {policy.gpu_batch_size}'} or the gpu percents"
        )
    if isinstance(error, EngineError | KeyboardInterrupt | SystemExit):
        return error
    return EngineError(f"the engine failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
