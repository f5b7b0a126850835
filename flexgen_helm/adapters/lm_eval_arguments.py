"""The arguments that lm-evaluation-harness passes to a model: model_args and the device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import ConfigError, did_you_mean
from engine.memory import accelerator
from engine.reading import parse_bytes

_DEFAULT_DEVICE = "cuda:0"
"""The device that the harness passes if the user names none."""
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "backend": ("default", "causal"),
    "logits_cache": (True, False),
    "truncation": (False,),
    "use_fast_tokenizer": (True,),
    "parallelize": (False,),
    "subfolder": ("",),
}
"""Arguments of the harness's `hf` model, with the values that request no more than what is done here."""
_SAID_HERE = {
    "trust_remote_code": "code of a model's directory is never run",
    "peft": "name the adapter as pretrained; its base model is found by its adapter_config.json",
    "gguf_file": "name the file as pretrained",
    "subfolder": "name the directory as pretrained",
    "tokenizer": "the tokenizer is that of the model's directory",
    "parallelize": "the policy places weights; gpu_memory and cpu_memory limit it",
    "device_map": "the policy places weights; gpu_memory and cpu_memory limit it",
    "max_memory_per_gpu": "give gpu_memory",
    "max_cpu_memory": "give cpu_memory",
    "offload_folder": "offload-dir of a policy names it",
    "tp_plan": "device of a policy names several devices",
    "load_in_4bit": "name a quantized checkpoint as pretrained, or a policy with compress-weight: 4",
    "load_in_8bit": "name a quantized checkpoint as pretrained, or a policy with compress-weight: 8",
    "quantization_config": "name a quantized checkpoint as pretrained, or a policy with compress-weight",
    "autogptq": "a quantized checkpoint needs no argument",
    "gptqmodel": "a quantized checkpoint needs no argument",
    "attn_implementation": "attention is the engine's own",
}
"""Arguments of the harness's `hf` model that are not supported, with what to do instead."""


def refuse_others(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise `ConfigError` for the first unsupported argument; batch sizes are ignored."""
    for name, value in given.items():
        if name in ("batch_size", "max_batch_size") or value is None or value in _HARMLESS.get(name, ()):
            continue
        if name in _SAID_HERE:
            raise ConfigError(f"model_args: {name}={value} is not supported: {_SAID_HERE[name]}; leave it out")
        nearest = did_you_mean(name, known)
        template = "" if "did you mean" in nearest else "; put arguments of the chat template into chat_template_args"
        raise ConfigError(f"model_args: unknown argument {name!r}{nearest}{template}")


def device_asked(asked: str | None, of_policy: str | tuple[str, ...], *, is_here: bool = True) -> str | tuple[str, ...]:
    """Choose the device to run on: as in the `hf` model, the harness's default gives way where it does not exist.

    `is_here`: whether the model runs on this machine.
    """
    if asked is None or (asked == _DEFAULT_DEVICE and (of_policy != "auto" or not is_here)):
        return of_policy
    if is_here and asked.startswith("cuda") and not accelerator.is_available("cuda"):
        logging.getLogger("lm_eval").warning("flexgen: there is no %s here; the model runs on the CPU", asked)
        return "cpu"
    return asked


def limit(size: str | float | None, name: str, otherwise: int | None) -> int | None:
    """Parse a limit in bytes; returns `otherwise` if there is none. Raises `ConfigError` for an invalid size."""
    return otherwise if size is None else parse_bytes(size, f"model_args: {name}")


def check_stops(until: Collection[str], think_end_token: str | int | None) -> None:
    """Raise `ConfigError` for a stop that begins inside the end-of-thinking marker, or contains it.

    A generated text ends before its stop, so that the end of thinking could no longer be found in it.
    """
    if not isinstance(think_end_token, str):
        return
    for stop in until:
        overlap = next((size for size in range(1, len(stop) + 1) if think_end_token.endswith(stop[:size])), 0)
        if overlap or think_end_token in stop:
            raise ConfigError(
                f"generation argument until: the stop {stop!r} overlaps think_end_token {think_end_token!r}; leave one "
                "of them out"
            )
