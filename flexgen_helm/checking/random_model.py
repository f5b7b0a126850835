"""Random models with a tokenizer trained on the spot, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.checkpoint.model_class import new_model
from engine.errors import named
from flexgen_helm.checking.shrinking import SPECIAL, VOCABULARY, WINDOW
from flexgen_helm.checking.undecided import UndecidedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_MOST_PARAMETERS = 20_000_000
_SET = "set its sizes as KEY=VALUE"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `VOCABULARY` tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{a}{b}{c}" for a in ("pre", "re", "un") for b in ("place", "load", "fill") for c in ("s", "ed", "ing")]
    tokenizer.train_from_iterator([" ".join(words), *(f" {n} {n * 37}" for n in range(400))], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=WINDOW
    )


def save_random(directory: Path, config: PreTrainedConfig) -> Path:
    """Write a random model of `config`, whose vocabulary is `VOCABULARY`, with its tokenizer to `directory`."""
    import torch

    torch.manual_seed(0)
    return save_with_tokenizer(directory, new_model(config))


def save_with_tokenizer(directory: Path, model: PreTrainedModel) -> Path:
    """Write a new model, with numbers far from those that it begins with, and its tokenizer to `directory`."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that an error shows
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        saved = model.state_dict()
        for prefix, module in model.named_modules():
            kept = {name: x for name, x in module.named_buffers(prefix, recurse=False) if name in saved}
            changed = [buffer for buffer in kept.values() if buffer.is_floating_point()]
            if len(changed) == 1:  # several are made from each other
                changed[0].mul_(0.9)
    model.generation_config.eos_token_id = SPECIAL["eos_token_id"]
    model.generation_config.pad_token_id = SPECIAL["pad_token_id"]
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def save_small(directory: Path, config: PreTrainedConfig) -> Path:
    """Like `save_random`, for a shrunk config; `UndecidedError` where it is still large, or cannot be built."""
    import torch

    try:
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in new_model(config).named_parameters()}
        if sum(sizes.values()) > _MOST_PARAMETERS:
            largest = max(sizes, key=lambda name: sizes[name])
            raise UndecidedError(
                f"{config.model_type}, shrunk, still has {sum(sizes.values()):,} parameters, {sizes[largest]:,} of "
                f"them in {largest}; {_SET}"
            )
        return save_random(directory, config)
    except UndecidedError:
        raise
    except Exception as error:  # whatever a model class finds wrong with the sizes
        raise UndecidedError(f"{config.model_type}, shrunk, cannot be built: {named(error)}; {_SET}") from None
