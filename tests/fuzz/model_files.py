"""Fuzz targets of a model directory: its config, tokenizer, chat template, and the headers of its weight files."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import files
from changes import as_json, changed, damaged, maybe_damaged
from door import Door
from hypothesis import strategies as st

from engine.errors import CheckpointError

TEMPLATE = """{%- if messages[0]['role'] == 'system' -%}<<{{ messages[0]['content'] | trim }}>>{%- endif -%}
{%- for m in messages if m['role'] != 'system' -%}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}
{% endfor -%}{%- if add_generation_prompt -%}[assistant]
{%- if thinking is defined and thinking %}<think>{% endif %}{%- endif -%}"""


@functools.cache
def model_directory() -> Path:
    """A tiny model with a tokenizer of 300 tokens, in a directory of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = files.SCRATCH / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["</s>", "<pad>", *alphabet, "ab", "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    return path


def _directory_with(folder: str, contents: Mapping[str, bytes]) -> Path:
    """Return the tiny model's directory with other files; always the same path."""
    path = files.SCRATCH / folder
    if not path.exists():
        shutil.copytree(model_directory(), path)
        for name in contents:
            (path / name).unlink(missing_ok=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


FAMILIES = (
    *(
        "llama",
        "gpt2",
        "opt",
        "mixtral",
        "qwen3",
        "gemma3_text",
        "gemma3",
        "deepseek_v3",
        "gpt_oss",
        "falcon",
        "mamba2",
    ),
    *("jamba", "phi3", "gpt_neox", "cohere2", "qwen3_next", "bloom", "llama4_text"),
)
QUANTIZED = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float16",
    },
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "mxfp4"},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 128}}
        },
    },
]


@functools.cache
def _configs() -> list[dict[str, Any]]:
    from transformers import AutoConfig

    found = []
    for family in FAMILIES:
        config = AutoConfig.for_model(family).to_dict()
        small = {
            key: value for key, value in config.items() if not (isinstance(value, list | dict) and len(value) > 60)
        }
        found.append({"model_type": family, **small})
    return found + [{**found[0], "quantization_config": each} for each in QUANTIZED]


def _config_files() -> st.SearchStrategy[Any]:
    from engine.checkpoint.config import WINDOW_KEYS

    config = changed(
        _configs(), keys=[*WINDOW_KEYS, "text_config", "rope_scaling", "transformers_weights"], more=FAMILIES
    )
    generation = {
        "eos_token_id": [0],
        "pad_token_id": 1,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
    }
    return st.tuples(
        maybe_damaged(config.map(as_json), 8),
        st.just(b"{}") | maybe_damaged(changed([generation]).map(as_json), 8),
    )


def _enter_config(files: tuple[bytes, bytes]) -> None:
    """Read a config as `describe` does, and run the model with it and generation_config.json."""
    from transformers import AutoTokenizer

    from engine.checkpoint.config import load_family_config, num_layers, read_config
    from engine.checkpoint.model_class import check_causal
    from engine.checkpoint.tokenizer import special_tokens
    from engine.checkpoint.weight_files import chosen_name
    from engine.checkpoint.window import longest_window, window_of

    config, generation = files
    path = _directory_with("config", {"config.json": config, "generation_config.json": generation})
    told = read_config(path)
    check_causal(path, told)
    chosen_name(path)
    family = load_family_config(path)
    window, longest = window_of(told), longest_window(told, is_rotary=True)
    assert window is None or (isinstance(window, int) and window >= 1), window
    assert longest is None or (isinstance(longest, int) and longest >= 1), longest
    assert isinstance(num_layers(told), int)
    special_tokens(path, family, AutoTokenizer)


def _tokenizer_files() -> st.SearchStrategy[Any]:
    path = model_directory()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    settings = json.loads((path / "tokenizer_config.json").read_text())
    others = [
        {**tokenizer, "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}},
        {
            **tokenizer,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(\\w|\\W)*x"},
                "behavior": "Isolated",
                "invert": False,
            },
        },
        {**tokenizer, "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 1, "direction": "Right"}},
        {
            **tokenizer,
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": 8,
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            },
        },
        {
            **tokenizer,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
            },
        },
        {
            **tokenizer,
            "model": {
                "type": "Unigram",
                "unk_id": 0,
                "vocab": [["</s>", 0.0], ["a", -1.0], ["b", -2.0]],
                "byte_fallback": False,
            },
        },
        {
            **tokenizer,
            "model": {
                "type": "WordPiece",
                "unk_token": "</s>",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": {"</s>": 0, "a": 1},
            },
        },
        {
            **tokenizer,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
        },
    ]
    special = {
        "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    }
    added = {
        "added_tokens_decoder": {"0": {**special["eos_token"], "special": True}},
        "extra_special_tokens": {"image_token": "<i>"},
    }
    return st.tuples(
        maybe_damaged(changed([tokenizer, *others]).map(as_json), 8),
        maybe_damaged(
            changed(
                [
                    settings,
                    {**settings, **added},
                    {**settings, "chat_template": [{"name": "default", "template": "a"}]},
                ],
                more=(
                    "PreTrainedTokenizerFast",
                    "LlamaTokenizer",
                    "GPT2Tokenizer",
                    "T5Tokenizer",
                    "Qwen2Tokenizer",
                    "BertTokenizer",
                ),
            ).map(as_json),
            8,
        ),
        st.just(b"{}") | changed([special]).map(as_json),
    )


def _enter_tokenizer(files: tuple[bytes, bytes, bytes]) -> None:
    """A tokenizer that is accepted must encode and decode a text."""
    from engine.checkpoint.tokenizer import load_tokenizer
    from engine.text.prompt import PromptTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    path = _directory_with("tokenizer", dict(zip(names, files, strict=True)))
    prompts = PromptTokenizer.of(load_tokenizer(path), 512)
    ids = prompts.plain("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa b\n")
    assert all(isinstance(each, int) for each in ids)
    prompts.tokenizer.decode(ids[:512])


PIECES = (
    *(
        "{% for a in range(99999) %}",
        "{% for a in messages %}",
        "{% endfor %}",
        "{% endif %}",
        "{% if a %}",
        "{% else %}",
    ),
    *("{{ messages }}", "{{ a }}", "{{ loop.index }}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}"),
    *(
        "{% set a = 'x' * 9999 %}",
        "{% set a = [1] * 999999 %}",
        "{% set ns = namespace(x='x') %}",
        "{% set ns.x = ns.x ~ ns.x %}",
    ),
    *(
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'x' * (9999 * 9999 * 9999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'.center(9999999999) }}",
    ),
    *(
        "{{ messages.__class__ }}",
        "{{ self }}",
        "{{ ''.join(messages) }}",
        "{{ messages | tojson }}",
        "{{ lipsum(99) }}",
    ),
    *("{% macro m(x) %}{{ m(x) }}{% endmacro %}", "{{ m(1) }}", "{% include 'a' %}", "{% break %}", "{# ", "{%", "}}"),
    *(
        "{% generation %}",
        "{% endgeneration %}",
        "{{ range(99999) | list | length }}",
        "{{ cycler.__init__.__globals__ }}",
    ),
    *(
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a' | indent(999999999) }}",
        "{{ range(99999)|batch(1)|list|string * 999 }}",
    ),
)


def _templates() -> st.SearchStrategy[bytes]:
    made = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)
    return made.map(lambda text: text.encode("utf-8", "replace")) | damaged(
        TEMPLATE.encode(), [each.encode() for each in PIECES]
    )


def _template_door() -> Callable[[bytes], None]:
    from engine.checkpoint.tokenizer import load_tokenizer
    from engine.text.prompt import PromptTokenizer
    from flexgen_helm.adapters.openai.model import Model

    tokenizer = load_tokenizer(model_directory())

    def enter(template: bytes) -> None:
        """A conversation must be rendered, or refused by the engine or by the template itself."""
        tokenizer.chat_template = template.decode("utf-8", "replace")
        prompts = PromptTokenizer.of(tokenizer, 512)
        model = Model.of(("tiny",), prompts, 600)
        if model.reasoner is None:
            return
        from flexgen_helm.adapters.openai.bodies import CHAT, read_body

        model.jobs(read_body({"model": "tiny", "messages": [{"role": "user", "content": "a"}]}, CHAT))

    return enter


def _headers() -> st.SearchStrategy[bytes]:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    documents = [
        {"a": entry, "__metadata__": {"format": "pt"}},
        {"a": entry, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}},
        {"a": {"dtype": "F8_E4M3", "shape": [0, 7], "data_offsets": [0, 0]}, "b": entry},
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
    ]
    kinds = (
        "F32",
        "F64",
        "I64",
        "BOOL",
        "C64",
        "F4",
        "F6_E2M3",
        "U8",
        "F8_E8M0",
        "f32",
        16,
        24,
        8,
        4,
        1 << 62,
        1 << 63,
    )

    told = maybe_damaged(changed(documents, keys=("dtype", "shape", "data_offsets"), more=kinds).map(as_json), 10)
    odd = st.sampled_from([*[0] * 40, 1, -1, -8, 1 << 40, 1 << 63])

    @st.composite
    def made(draw: Any) -> bytes:
        header = draw(told)
        size = max([0, *(int(end) for end in re.findall(rb"(\d{1,3})\]", header))])  # as offsets are written
        return ((len(header) + draw(odd)) % (1 << 64)).to_bytes(8, "little") + header + bytes(size + draw(more))

    more = st.sampled_from([*[0] * 20, 1, 8])
    return maybe_damaged(made(), 10)


def _enter_header(content: bytes) -> None:
    """A file that is accepted must give every tensor of its header, with the size stated there."""
    from engine.checkpoint.tensors import tensors_of

    file = files.SCRATCH / "x.safetensors"
    file.write_bytes(content)
    for _, load in tensors_of(file):
        values = load()
        values.flatten()[:1].clone()
        assert values.numel() * values.element_size() <= len(content)


def _gguf_files() -> st.SearchStrategy[bytes]:
    content = gguf_file()
    words = [
        (each).to_bytes(8, "little") for each in (0, 1, 7, 8, 9, 12, 13, 255, 1 << 31, 1 << 32, 1 << 60, (1 << 64) - 1)
    ]
    words += [each[:4] for each in words]
    return damaged(content[:2000], words).map(lambda head: head + content[2000:]) | damaged(content, words)


@functools.cache
def gguf_file() -> bytes:
    """A tiny GGUF file."""
    import gguf
    import numpy as np

    file = files.SCRATCH / "seed.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in {
        "context_length": 64,
        "block_count": 1,
        "feed_forward_length": 32,
        "embedding_length": 32,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(12)), "▁", "a"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(at) for at in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[6] * 12, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = [
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
    ]
    names += [
        f"blk.0.{each}.weight"
        for each in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]
    for name in names:
        shape = (len(tokens), 32) if name in names[:2] else (32,) if "norm" in name else (32, 32)
        values = np.zeros(shape, np.float32)
        if len(shape) > 1:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def _enter_gguf_header(content: bytes) -> None:
    """The file's size must bound what the gguf package reads of it, and for how long."""
    from gguf import GGUFReader

    from engine.checkpoint.gguf.header import check_header

    file = files.SCRATCH / "x.gguf"
    file.write_bytes(content)
    check_header(file, file)
    try:
        GGUFReader(file)
    except Exception as error:  # reported as an error of the file
        raise CheckpointError("x") from error


def _enter_gguf(content: bytes) -> None:
    from engine.checkpoint.gguf.opened import gguf_directory

    file = files.SCRATCH / "y.gguf"
    file.write_bytes(content)
    try:
        gguf_directory(file)
    finally:
        left = list((files.SCRATCH / "cache" / "flexgen-helm" / "gguf").glob(".*"))
        assert not left, f"left behind: {left}"
        shutil.rmtree(files.SCRATCH / "cache", ignore_errors=True)


DOORS = [
    Door("configs of models", _config_files, lambda: _enter_config),
    Door("tokenizers", _tokenizer_files, lambda: _enter_tokenizer),
    Door("chat templates", _templates, _template_door),
    Door("headers of safetensors files", _headers, lambda: _enter_header),
    Door("headers of GGUF files", _gguf_files, lambda: _enter_gguf_header),
    Door("whole GGUF files", _gguf_files, lambda: _enter_gguf),
]
