"""What plain transformers makes of a model and its prompts: log-probabilities of one forward, tokens of generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.model_class import read_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_reference(directory: Path) -> PreTrainedModel:
    """A model directory in plain transformers, float32, as `from_pretrained` makes it by default."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    # Older transformers take an attention by default that leaves out the cap of the scores; newer ones do not.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = read_model(directory, dtype=torch.float32, attn_implementation=attention)
    model.eval()
    return model


def reference_logprobs(model: PreTrainedModel, tokens: list[int]) -> list[float]:
    """Natural log of p(tokens[i] | tokens[:i]) for i >= 1, by one plain forward."""
    import torch

    if len(tokens) == 1:
        return []
    with torch.no_grad():  # the last token may fill the window
        logprobs = model(torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)
    return [logprobs[i - 1, tokens[i]].item() for i in range(1, len(tokens))]


def reference_greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy tokens of `model.generate`, end-of-text excluded."""
    import torch

    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens and tokens[-1] == 2 else tokens
