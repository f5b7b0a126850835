"""Protects: check says of a model how it runs, tries a copy that does what the model does, and can say no."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import loras
import models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.kernels.packed.numbers import ScaledBlocks
from flexgen_helm.checking import trial
from flexgen_helm.checking.left_out import left_out
from flexgen_helm.checking.memory_needs import memory_needs
from flexgen_helm.checking.shrinking import config_from, small_config
from flexgen_helm.planning.shapes import SHAPES
from flexgen_helm.run import main

# Settings of real models, as their config.json has them.
REAL: dict[str, dict[str, Any]] = {
    "post-norm OPT": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "ffn_dim": 4096,
        "vocab_size": 50272,
        "init_std": 0.05,
        "torch_dtype": "float16",
    },
    "grouped heads, extended positions": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "eos_token_id": [128001, 128008, 128009],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    },
    "a full layer after five with windows": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 1152,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "num_hidden_layers": 26,
        "intermediate_size": 6912,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
        "vocab_size": 262144,
        "torch_dtype": "bfloat16",
    },
    "experts": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "vocab_size": 32000,
        "torch_dtype": "bfloat16",
    },
    "a layer without positions after three with": {
        "model_type": "smollm3",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 36,
        "no_rope_layer_interval": 4,
        "intermediate_size": 11008,
        "vocab_size": 128256,
    },
}


SMALL = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 4}


def small(name: str) -> Any:
    return small_config(config_from(REAL[name], {}), {})


def config_file(folder: Path, name: str, **changes: Any) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(REAL[name] | changes))
    return str(file)


@pytest.fixture
def one_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first policy alone, where what is tested is not the comparison."""
    monkeypatch.setattr(trial, "POLICIES", dict([*trial.POLICIES.items()][:1]))


def test_sizes_shrink_and_kinds_stay() -> None:
    opt = small("post-norm OPT")
    assert (opt.hidden_size, opt.word_embed_proj_dim, opt.do_layer_norm_before) == (64, 32, False)
    assert (opt.num_hidden_layers, opt.vocab_size) == (3, models.VOCABULARY)
    llama = small("grouped heads, extended positions")
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.eos_token_id) == (4, 2, 2)
    assert (llama.rope_parameters["rope_type"], llama.rope_parameters["factor"]) == ("llama3", 8.0)
    assert llama.rope_parameters["original_max_position_embeddings"] < llama.max_position_embeddings == models.WINDOW
    assert getattr(llama, "quantization_config", None) is None
    gemma = small("a full layer after five with windows")
    assert (gemma.num_key_value_heads, gemma.head_dim, gemma.sliding_window) == (1, 16, 8)
    assert gemma.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert small("experts").num_local_experts == 4
    assert small("a layer without positions after three with").no_rope_layers == [1, 1, 1, 0]


def test_settings_given_by_hand_reach_what_the_config_derives_from_them() -> None:
    """Which layers have windows is decided when a config is made."""
    windows = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
    config = small_config(config_from({"model_type": "qwen2_moe"}, windows), windows)
    assert {*config.layer_types} == {"full_attention", "sliding_attention"}


def test_a_model_with_windows_that_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "check.json"
    file = config_file(tmp_path, "a full layer after five with windows")
    assert main(["check", file, "--json", str(told)]) == 0
    shown = capsys.readouterr()
    assert "Gemma3ForCausalLM (gemma3_text)" in shown.out
    assert "layers attend: 22 within 512 tokens, 4 over all tokens" in shown.out
    assert shown.out.count("0 of 17 prompts differ") == 3
    assert shown.out.splitlines()[-1].startswith("EQUAL: ")
    assert shown.err == ""
    found = json.loads(told.read_text())
    assert (found["verdict"], found["reasons"], found["facts"]["path"]) == ("equal", [], "attention interface")
    config = AutoConfig.for_model(**REAL["a full layer after five with windows"])
    with torch.device("meta"):
        size = 2 * sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert found["needs"]["weight_bytes"] == size
    assert found["needs"]["token_bytes"] == 26 * 2 * 256 * 2  # layers, key and value, head, bytes
    assert len(found["copy"]["runs"]) == 3


def test_a_directory_with_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_policy: None) -> None:
    directory = models.save_model(tmp_path / "model", "mixtral")
    assert main(["check", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "4 experts a layer, 2 for a token" in shown
    assert "TokenizersBackend, 500 tokens, nothing before a text, no chat template" in shown
    assert "were not looked at" not in shown


def test_a_text_half_is_tried_inside_its_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_policy: None
) -> None:
    """Which transformers reads in no other way; the encoders beside it are small."""
    half = {"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 4, "vocab_size": 2000, "num_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(half))
    assert main(["check", str(tmp_path / "config.json")]) == 0
    shown = capsys.readouterr().out
    assert "Qwen3VLMoeForConditionalGeneration (qwen3_vl_moe)" in shown
    assert shown.splitlines()[-1].startswith("EQUAL: ")


def shape_of(name: str) -> dict[str, Any]:
    return {**SHAPES[name]}


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8,
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
LLAMA = "grouped heads, extended positions"
PACKED: dict[str, tuple[dict[str, Any], int, str]] = {
    "mxfp4": (shape_of("gpt-oss-20b"), 0, "EQUAL: "),
    "float8 in blocks": (shape_of("deepseek-v3"), 0, "EQUAL: "),
    "int4 experts": (shape_of("kimi-k2"), 0, "EQUAL: "),
    "inputs that are rounded": (
        REAL[LLAMA] | {"quantization_config": W8A8},
        2,
        "UNDECIDED: the copy's inputs of linear layers are not rounded to a few bits",
    ),
    "a format without codes": (REAL[LLAMA], 2, "UNDECIDED: random codes are not made of 'awq'"),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_model_s_copy_is_packed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_policy: None
) -> None:
    """Where codes can be made of its format; else what is said to be equal is the plain copy, and that is told."""
    config, code, verdict = PACKED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path / "config.json")]) == code
    shown = capsys.readouterr().out
    assert "0 of 17 prompts differ" in shown
    assert (", packed by " in shown) == (config["quantization_config"]["quant_method"] != "awq")
    assert shown.splitlines()[-1].startswith(verdict)


def test_a_format_that_is_expanded_wrongly_is_not_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_policy: None
) -> None:
    numbers = ScaledBlocks._numbers
    monkeypatch.setattr(ScaledBlocks, "_numbers", lambda *args: numbers(*args) * 1.01)
    (tmp_path / "config.json").write_text(json.dumps(shape_of("deepseek-v3")))
    assert main(["check", str(tmp_path / "config.json")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("DIFFERENT: ")


def test_an_adapter_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_policy: None) -> None:
    base = models.save_model(tmp_path / "base", "llama")
    assert main(["check", str(loras.save_adapter(tmp_path / "lora", base))]) == 0
    assert "an adapter (LoRA of rank 4) is merged into the weights while loading" in capsys.readouterr().out


def test_a_model_that_does_not_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_policy: None
) -> None:
    def other(directory: Path) -> PreTrainedModel:
        model = models.load_reference(directory)
        with torch.no_grad():
            model.get_parameter("model.decoder.layers.1.self_attn.v_proj.weight").mul_(1.01)
        return model

    monkeypatch.setattr(trial, "load_reference", other)
    assert main(["check", config_file(tmp_path, "post-norm OPT")]) == 1
    shown = capsys.readouterr().out
    assert "log-probabilities differ by up to" in shown
    assert shown.splitlines()[-1].startswith("DIFFERENT: ")


def test_a_copy_in_which_context_hardly_matters_is_undecided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_policy: None
) -> None:
    directory = models.save_model(tmp_path / "model", "granite")
    assert main(["check", str(directory), "logits_scaling=1000.0"]) == 2
    assert "too little for agreement to say anything" in capsys.readouterr().out.splitlines()[-1]


def test_what_no_prompt_reaches_is_undecided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_policy: None
) -> None:
    directory = models.save_model(tmp_path / "model", "mistral")
    assert main(["check", str(directory), "sliding_window=4096"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("UNDECIDED: no prompt of the check reaches sliding_window 4096 (")


def test_layers_that_shrinking_leaves_out_are_told() -> None:
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_hidden_layers": 3, "hidden_size": 64}
    full, tiny = (config_from({**experts, "mlp_only_layers": layers}, {}) for layers in ([0, 1], [0, 1, 2]))
    assert any("Qwen3MoeSparseMoeBlock" in what for what in left_out(full, tiny, 50))
    assert left_out(full, full, 50) == []
    windows = {"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 8}
    mixed, plain = (
        config_from({**windows, "layer_types": [kind, "full_attention"]}, {})
        for kind in ("sliding_attention", "full_attention")
    )
    assert "the copy has no layer whose layer_types is sliding_attention" in left_out(mixed, plain, 50)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**SMALL, "model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}, "RwkvForCausalLM (rwkv)"),
        ({"n_embd": 64, "n_head": 4, "n_layer": 2, "model_type": "openai-gpt"}, "no keys and values"),
        ({"model_type": "t5", "architectures": ["T5Model"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "kimi_k3", "architectures": ["KimiForCausalLM"]}, "no causal language model that this"),
    ],
)
def test_a_model_that_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["check", str(tmp_path / "config.json"), "--json", str(tmp_path / "told")]) == 2
    shown = capsys.readouterr()
    assert shown.err == ""
    last = shown.out.splitlines()[-1]
    assert last.startswith("REFUSED: ")
    assert reason in last
    found = json.loads((tmp_path / "told").read_text())
    assert (found["verdict"], found["copy"]) == ("refused", None)


def test_a_directory_that_lacks_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = models.save_model(tmp_path / "model", "llama")
    shutil.copytree(directory, tmp_path / "other")
    (directory / "model.safetensors").unlink()
    assert main(["check", str(directory)]) == 2
    assert "REFUSED: " in capsys.readouterr().out
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    assert main(["check", str(tmp_path / "other")]) == 2
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM (llama)" in shown
    assert "its tokenizer cannot be loaded" in shown.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["no/such/model"], "does not exist"),
        (["MODEL", "hidden_size"], "'hidden_size' is not KEY=VALUE"),
        (["MODEL", "num_attention_heads=seven"], "num_attention_heads"),
        (["MODEL", "--json", "no-such-folder/x"], "there is no directory"),
        (["EMPTY"], "names no model_type"),
    ],
)
def test_bad_input(arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text("{}")
    known = {
        "MODEL": config_file(tmp_path, "post-norm OPT", num_hidden_layers=1),
        "EMPTY": str(tmp_path / "empty.json"),
    }
    assert main(["check", *(known.get(each, each) for each in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flexgen-helm: error: ")
    assert part in line


def test_sizes_that_cannot_be_tried_are_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_file(tmp_path, "post-norm OPT", num_hidden_layers=1)
    assert main(["check", file, "ffn_dim=10000000"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("UNDECIDED: opt, shrunk, still has ")


def test_the_least_device_holds_two_layers_and_not_the_model() -> None:
    from engine.planning.model_shape import ModelShape

    layer, head = 10**9, 10**8
    shape = ModelShape(
        unit_bytes=(*[layer] * 40, head),
        embedding_bytes=head,
        outer_bytes=0,
        cache_row_bytes=10**5,
        cache_layer_row_bytes=2500,
        hidden_row_bytes=10**4,
        work_row_bytes=10**5,
    )
    assert 2 * layer < memory_needs(shape, "bfloat16").least_device_bytes < 5 * layer


def test_check_imports_no_helm(tmp_path: Path) -> None:
    file = config_file(tmp_path, "post-norm OPT", num_hidden_layers=1)
    program = (
        "import sys; from flexgen_helm.run import main;"
        f"code = main(['check', {file!r}, 'ffn_dim=10000000']);"
        "print(code, [name for name in sys.modules if name.partition('.')[0] == 'helm'])"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 []"
