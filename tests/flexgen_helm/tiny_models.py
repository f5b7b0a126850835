"""Random models small enough for every test, with tokenizers of their own, and the HELM entries to run them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

WINDOW = 512


def train_tokenizer(path: Path, *, adds_bos: bool, chat_template: str | None = None) -> Any:
    """A byte-level BPE of 600 tokens; with `adds_bos` it puts "</s>" in front, as OPT's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = "\n".join((Path(random.__file__).parent / name).read_text() for name in ("random.py", "textwrap.py"))
    tokenizer.train_from_iterator([text, "Question: What is the capital of France?\nAnswer: Paris\n\n" * 50], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="</s> $A", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>", pad_token="<pad>", model_max_length=WINDOW
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(path)
    return wrapped


def train_sentencepiece(path: Path, *, adds_bos: bool, chat_template: str | None = None) -> Any:
    """A tokenizer like Llama's: "▁" for spaces, one in front of every text, bytes for what it has no piece for.

    A token decoded by itself loses its space, and a line end is the piece <0x0A>. With `adds_bos`, "<s>" comes first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()  # pieces begin with a space, or with none
    text = (Path(random.__file__).parent / "textwrap.py").read_text().split() + ["capital", "France", "Paris"] * 50
    learner.train_from_iterator([" ".join(text)], trainers.BpeTrainer(vocab_size=300))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=WINDOW
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(path)
    return wrapped


def save_tiny_model(
    path: Path,
    make: Callable[[Any], Any],
    *,
    train: Callable[..., Any] = train_tokenizer,
    loud: Sequence[str] = ("Ċ", "</s>"),  # a line end, as byte-level BPE writes it
    **tokenizer: Any,
) -> Path:
    """A random float32 model whose greedy text has the `loud` tokens in it; `make` gets the tokenizer.

    `train` makes the tokenizer, by default with line ends and an end among the loud tokens.
    """
    import torch

    trained = train(path, **{"adds_bos": False, **tokenizer})
    torch.manual_seed(0)
    model = make(trained)
    with torch.no_grad():
        for token in loud:
            model.get_output_embeddings().weight[trained.convert_tokens_to_ids(token)] *= 1.6
    model.to(torch.float32).save_pretrained(path)
    return path


def random_llama(tokenizer: Any) -> Any:
    """Two layers with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def random_opt(tokenizer: Any) -> Any:
    """Two layers, with OPT's learned positions."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        init_std=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OPTForCausalLM(config)


def random_gpt2(tokenizer: Any) -> Any:
    """Two layers, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=WINDOW,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def random_gptj(tokenizer: Any) -> Any:
    """Two layers that carry their own attention."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_embd=48,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=WINDOW,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPTJForCausalLM(config)


def write_entries(local_path: Path, name: str, model: Path, **clients: dict[str, Any]) -> None:
    """Write HELM's three YAML files for `model`, with a deployment for each of `clients`: host -> client_spec."""
    local_path.mkdir(parents=True, exist_ok=True)
    files = {
        "model_metadata": {
            "models": [
                {
                    "name": name,
                    "display_name": name,
                    "description": "random weights",
                    "creator_organization_name": "Local",
                    "access": "open",
                    "tags": ["TEXT_MODEL_TAG", "PARTIAL_FUNCTIONALITY_TEXT_MODEL_TAG"],
                }
            ]
        },
        "tokenizer_configs": {
            "tokenizer_configs": [
                {
                    "name": name,
                    "tokenizer_spec": {
                        "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                        "args": {"pretrained_model_name_or_path": str(model)},
                    },
                    "end_of_text_token": "</s>",
                    "prefix_token": "</s>",
                }
            ]
        },
        "model_deployments": {
            "model_deployments": [
                {
                    "name": f"{host}/{name.split('/')[1]}",
                    "model_name": name,
                    "tokenizer_name": name,
                    "max_sequence_length": WINDOW,
                    "client_spec": spec,
                }
                for host, spec in clients.items()
            ]
        },
    }
    for file, content in files.items():
        (local_path / f"{file}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def ours(model: Path, **args: Any) -> dict[str, Any]:
    """The client_spec of our client."""
    args = {"pretrained_model_name_or_path": str(model), "policy": {"device": "cpu"}, **args}
    return {"class_name": "flexgen_helm.client.FlexGenClient", "args": args}
