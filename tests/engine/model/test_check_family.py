"""Protects: the check of a family in no list shrinks real configs without changing their kind, and can say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check_family
import models
import pytest
import torch
from transformers import PreTrainedModel

# Sizes of real models, as their config.json has them.
REAL: dict[str, dict[str, Any]] = {
    "post-norm OPT": {
        "model_type": "opt",
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "ffn_dim": 4096,
        "vocab_size": 50272,
        "torch_dtype": "float16",
    },
    "grouped heads, extended positions": {
        "model_type": "llama",
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
        "quantization_config": {"quant_method": "awq", "bits": 4},
    },
    "a full layer after five with windows": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "num_hidden_layers": 26,
        "intermediate_size": 6912,
        "sliding_window": 512,
        "vocab_size": 262144,
    },
}


def shrunk(name: str, folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(REAL[name]))
    return check_family.tiny_config(str(folder), {})


def test_sizes_shrink_and_kinds_stay(tmp_path: Path) -> None:
    opt = shrunk("post-norm OPT", tmp_path)
    assert (opt.hidden_size, opt.word_embed_proj_dim, opt.do_layer_norm_before) == (64, 32, False)
    assert (opt.num_hidden_layers, opt.vocab_size) == (3, models.VOCABULARY)
    llama = shrunk("grouped heads, extended positions", tmp_path)
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.eos_token_id) == (4, 2, 2)
    assert (llama.rope_parameters["rope_type"], llama.rope_parameters["factor"]) == ("llama3", 8.0)
    assert llama.rope_parameters["original_max_position_embeddings"] < llama.max_position_embeddings == models.WINDOW
    assert getattr(llama, "quantization_config", None) is None
    gemma = shrunk("a full layer after five with windows", tmp_path)
    assert (gemma.num_key_value_heads, gemma.head_dim, gemma.sliding_window) == (1, 16, 8)
    assert gemma.layer_types == ["sliding_attention"] * 5 + ["full_attention"]


def test_a_family_that_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REAL["post-norm OPT"]))
    assert check_family.main([str(tmp_path / "config.json"), "init_std=0.05"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("0 of 17 jobs differ") == 3
    assert shown.endswith("EXACT\n")


def test_a_family_that_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    load = models.load_reference

    def other(directory: Path) -> PreTrainedModel:
        model = load(directory)
        with torch.no_grad():
            model.get_parameter("model.layers.1.self_attn.v_proj.weight").mul_(1.01)
        return model

    monkeypatch.setattr(models, "load_reference", other)
    assert check_family.main(["llama"]) == 1
    shown = capsys.readouterr().out
    assert "log-probabilities differ by up to" in shown
    assert shown.endswith("DIFFERENT\n")


def test_a_family_whose_context_hardly_matters(capsys: pytest.CaptureFixture[str]) -> None:
    """Agreement is not taken for a proof then."""
    assert check_family.main(["granite", "logits_scaling=1000.0"]) == 1
    shown = capsys.readouterr().out
    assert "agreement would say nothing" in shown
    assert shown.endswith("UNDECIDED\n")


def test_a_family_that_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_family.main(["mamba"]) == 1
    assert "REFUSED: MambaForCausalLM (mamba)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["no_such_family"], "'no_such_family' is no model type"),
        (["llama", "hidden_size"], "'hidden_size' is not KEY=VALUE"),
        (["llama", "num_attention_heads=7"], "llama"),
        (["opt", "ffn_dim=10000000"], "parameters"),
    ],
)
def test_bad_input(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_family.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert part in shown.err
    assert shown.err.count("\n") == 1


def test_switches_that_were_off_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A window that no prompt reaches and experts that shrinking left out do not count as checked."""
    assert check_family.main(["mistral", "sliding_window=4096"]) == 1
    shown = capsys.readouterr().out
    assert "not run: sliding_window 4096, which no prompt of the check reaches (" in shown
    assert shown.endswith("UNDECIDED\n")


def test_layers_that_shrinking_leaves_out_are_told() -> None:
    experts = {"num_experts": 4, "num_hidden_layers": 3, "hidden_size": 64, "moe_intermediate_size": 32}
    full, tiny = (
        check_family.CONFIG_MAPPING["qwen3_moe"](**experts, mlp_only_layers=layers) for layers in ([0, 1], [0, 1, 2])
    )
    assert any("Qwen3MoeSparseMoeBlock" in what for what in check_family.not_run(full, tiny))
    assert check_family.not_run(full, full) == []
