"""The oracle of `verify`: a checkpoint run by plain `transformers`, one request at a time, without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.adapters.declared import adapter_folder
from engine.checkpoint.config import read_config
from engine.checkpoint.description import ModelDescription
from engine.checkpoint.gguf.index import GGUF_INDEX
from engine.checkpoint.model_class import read_model
from engine.checkpoint.quantized.declared import declared_quantization
from engine.checkpoint.quantized.methods import left_unrounded
from engine.errors import CapacityError, CheckpointError, EngineError, UnsupportedError
from engine.job import Completion, FinishReason, Job
from engine.planning.hardware import available_memory, resolve_device, resolve_dtype
from engine.policy import Policy
from engine.reading import find_file
from engine.thinking import Reading
from flexgen_helm.fidelity.oracle import Forced

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DEVICE_FRACTION = 0.9
"""The share of the device memory that weights may take; the rest is for activations."""
_ROWS = 256
"""Rows of logits that are turned into float32 log-probabilities together."""


@dataclass(frozen=True)
class Place:
    """The device and dtype of the reference."""

    device: str
    dtype: str


def find_place(description: ModelDescription, policy: Policy) -> Place:
    """Choose the policy's dtype, and its device if the uncompressed weights fit there, else the CPU.

    Raises `CapacityError` if host memory, through which they pass in any case, cannot hold them, and `UnsupportedError`
    for a quantized checkpoint that `transformers` cannot run here.
    """
    _check_quantizer(description)
    _check_merger(description)
    device = resolve_device(policy.device)
    dtype = resolve_dtype(policy.dtype, description.dtype, device)
    num_bytes = description.weight_bytes * _BYTES[dtype] // _BYTES.get(description.dtype, _BYTES[dtype])
    memory = available_memory(device, None, None, None)
    if num_bytes > memory.host:
        raise CapacityError(
            f"its whole weights, {_gb(num_bytes)} in {dtype}, exceed the {_gb(memory.host)} of host memory that can be "
            "had"
        )
    return Place(device if num_bytes <= memory.device * _DEVICE_FRACTION else "cpu", dtype)


def _check_quantizer(description: ModelDescription) -> None:
    """Check the library of the format, which `transformers` needs, unlike the engine."""
    path = Path(description.path)
    if find_file(path / GGUF_INDEX, CheckpointError):  # it has blocks or plain numbers
        raise UnsupportedError("it is a GGUF file, of which transformers would hold all numbers in float32")
    config = read_config(path)
    quantization = declared_quantization(path, config.get("quantization_config"))
    if not quantization:
        return
    if unrounded := left_unrounded(path, config):
        raise UnsupportedError(f"it comes quantized, and its own library rounds what is not rounded here: {unrounded}")
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True).validate_environment()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"it comes quantized, and transformers cannot run it as a whole here: {' '.join(str(error).split())[:300]}"
        ) from None


def _check_merger(description: ModelDescription) -> None:
    """Check peft, which `transformers` needs for an adapter, unlike the engine."""
    if adapter_folder(Path(description.path)) and not find_spec("peft"):
        raise UnsupportedError("it is an adapter, which plain transformers merges by peft, and peft is not installed")


class Reference:
    """A model loaded by `from_pretrained`: scores tokens by its forward, decodes greedily by its `generate`."""

    decodes = True

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, window: int | None) -> None:
        from transformers import GenerationConfig

        self._model = model.eval()
        self._tokenizer = tokenizer
        self._window = window
        found = model.generation_config.eos_token_id
        found = tokenizer.eos_token_id if found is None else found
        self._end_of_text = [] if found is None else [found] if isinstance(found, int) else list(found)
        # A checkpoint's own settings (penalties, bad words) would change greedy decoding.
        model.generation_config = GenerationConfig(
            eos_token_id=self._end_of_text or None, pad_token_id=(self._end_of_text or [0])[0]
        )

    @classmethod
    def load(cls, description: ModelDescription, place: Place) -> Reference:
        """Load weights and tokenizer; takes as long as reading them does."""
        import torch
        from transformers import AutoTokenizer

        model: Any = read_model(description.path, dtype=getattr(torch, place.dtype))
        if (folder := adapter_folder(Path(description.path))) is not None:
            model = import_module("peft").PeftModel.from_pretrained(model, folder).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(description.path, trust_remote_code=False)
        return cls(model.to(place.device), tokenizer, window=description.window)

    def force(self, job: Job, tokens: Sequence[int]) -> Forced:
        """Score `tokens` as the continuation of the job's prompt, and the prompt itself where the job requests it.

        Raises `EngineError` where a log-probability is not finite.
        """
        import torch

        ids = [*job.prompt, *tokens]
        first = 0 if job.prompt_logprobs else len(job.prompt) - 1
        fed = torch.tensor([ids[: self._window]], device=self._model.device)  # a last token may need no position
        following = torch.tensor(ids[first + 1 :], device=self._model.device)
        logprobs, margins = [], []
        with torch.inference_mode():
            logits = self._model(input_ids=fed, attention_mask=torch.ones_like(fed)).logits[0, first:]
            for start in range(0, len(logits), _ROWS):
                rows = logits[start : start + _ROWS].float().log_softmax(dim=-1)
                likeliest = rows.topk(2, dim=-1).values
                margins += (likeliest[:, 0] - likeliest[:, 1]).tolist()
                chosen = following[start : start + _ROWS]
                logprobs.append(rows[: len(chosen)].gather(-1, chosen[:, None])[:, 0])
        self._check_finite(logprobs)
        values = torch.cat(logprobs).tolist()
        before = len(job.prompt) - 1 - first
        return Forced(
            prompt_logprobs=(None, *values[:before]) if job.prompt_logprobs else None,
            logprobs=tuple(values[before:]),
            margins=tuple(margins[before:]),
        )

    def greedy(self, job: Job, ours: Completion | None = None) -> Completion:
        """Decode greedily up to the job's stops and length; without log-probabilities."""
        import torch

        prompt = torch.tensor([list(job.prompt)], device=self._model.device)
        length = prompt.shape[1]

        def is_done(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.tensor([self._reason(ids[0, length:].tolist(), job) is not None], device=ids.device)

        with torch.inference_mode():
            ids = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                logits_processor=[] if job.sampling.rules is None else job.sampling.rules.processors(prompt.device),
                max_new_tokens=job.max_new_tokens,
                stopping_criteria=[is_done],
            )
        return self._completion(ids[0, length:].tolist(), job)

    def _reason(self, tokens: list[int], job: Job) -> FinishReason | None:
        if tokens[-1] in self._end_of_text:
            return "endoftext"
        text = str(self._tokenizer.decode(tokens))
        reading = Reading("answer", None, 0) if job.thinking is None else job.thinking.read(text)
        text = text[reading.begin :] if reading.place == "answer" else ""
        if any(stop in text if isinstance(stop, str) else _ends_with(tokens, stop) for stop in job.stop):
            return "stop"
        return None

    def _completion(self, tokens: list[int], job: Job) -> Completion:
        """The text before the stop, and the shortest beginning of the tokens that it takes to produce it."""
        reason = self._reason(tokens, job) or "length"
        if reason == "endoftext":
            tokens = tokens[:-1]
        elif reason == "stop":
            by_ids = [len(stop) for stop in job.stop if not isinstance(stop, str) and _ends_with(tokens, stop)]
            tokens = tokens[: len(tokens) - max(by_ids, default=0)]
        text = self._decode(tokens)
        begin = 0 if job.thinking is None else job.thinking.read(text).begin
        places = [text.find(stop, begin) for stop in job.stop if isinstance(stop, str)]
        found = [place for place in places if place >= 0]
        if found:
            reason, text = "stop", text[: min(found)]
            tokens = next(tokens[:n] for n in range(len(tokens) + 1) if self._decode(tokens[:n]).startswith(text))
        return Completion(text=text, tokens=tuple(tokens), finish_reason=reason)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens)) if tokens else ""

    def _check_finite(self, logprobs: Sequence[torch.Tensor]) -> None:
        if not all(bool(part.isfinite().all()) for part in logprobs):
            raise EngineError(
                f"the reference's log-probabilities are not finite in {str(self._model.dtype).removeprefix('torch.')}; "
                "verify with another dtype in the policy (float32 or bfloat16)"
            )


def _ends_with(tokens: Sequence[int], stop: Sequence[int]) -> bool:
    return list(stop) == list(tokens[-len(stop) :])


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
