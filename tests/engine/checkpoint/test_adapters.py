"""Protects: LoRA adapters open like models, merged as peft merges them; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loras
import models
import packers
import parity
import pytest
import torch
from loras import save_adapter
from parity import JOBS, POLICIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import Engine, Job, Policy
from engine.checkpoint.adapters.located import locate
from engine.checkpoint.description import describe
from engine.checkpoint.identity.result import result_identity, sampled_identity
from engine.errors import EngineError
from engine.model.causal_model import CausalModel
from engine.opening import check_model
from engine.weights.unit_values import UnitValues

CPU = torch.device("cpu")
Build = Callable[[str], Path]


def loaded(model: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters of a model as loading brings them."""
    path = locate(str(model)).path
    opened = CausalModel(path, dtype, CPU)
    values = UnitValues(path, opened)
    found = {name: each for unit in opened.units if unit.owners for name, each in values.take(unit).items()}
    values.close()
    return found


@pytest.mark.parametrize("policy", ["device", "disk"])
def test_an_adapter_runs_as_its_merged_model_does(policy: str, build: Build, tmp_path: Path) -> None:
    """What is read from the checkpoint's own files under "disk" is not what the adapter changes."""
    lora = save_adapter(tmp_path / "lora", build("llama"))
    merged = Path(shutil.copytree(build("llama"), tmp_path / "merged"))
    loras.merge(merged, lora, 6 / 4)
    expected = parity.expect(models.load_reference(merged))
    assert expected != parity.expect(models.load_reference(build("llama")))
    settings = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path / "off")}
    with Engine.from_pretrained(str(lora), policy=settings) as engine:
        done = engine.run(JOBS)
        stock = engine.compare_with_stock(JOBS[:2], done[:2])
    assert parity.differences(expected, done)[0] == []
    assert stock.has_compared_weights
    assert all(stage.is_within for stage in stock.stages)


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6}),
    "a pattern": ("opt", {"target_modules": r".*\.(fc1|v_proj)", "exclude_modules": r".*\.1\..*"}),
    "rsLoRA, transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_rslora": True}),
    "ranks and alphas of their own": (
        "mistral",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 8},
            "alpha_pattern": {"^model.layers.0.*": 3},
        },
    ),
    "the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "all beside experts": ("qwen2-moe", {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.filterwarnings("ignore")  # of peft, about what it sets itself
def test_merged_matrices_are_peft_s(name: str, build: Build, tmp_path: Path) -> None:
    """Bit for bit, in float32 and in bfloat16, from adapters in both."""
    peft = pytest.importorskip("peft")
    family, told = PEFT[name]
    base = models.load_reference(build(family))
    lora = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 4, **told})
    )
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    lora.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    for stored, dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2):
        save_file({name: each.to(stored) for name, each in load_file(file).items()}, file, metadata={"format": "pt"})
        plain = AutoModelForCausalLM.from_pretrained(build(family), dtype=dtype)
        expected = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().state_dict()
        untouched = AutoModelForCausalLM.from_pretrained(build(family), dtype=dtype).state_dict()
        found = loaded(tmp_path, dtype)
        assert [name for name in found if not found[name].to(dtype).equal(expected[name].to(dtype))] == []
        assert any(not values.to(dtype).equal(untouched[name].to(dtype)) for name, values in found.items())


def test_the_identity_is_of_base_model_and_adapter(build: Build, tmp_path: Path) -> None:
    base = Path(shutil.copytree(build("llama"), tmp_path / "base"))
    lora, policy = save_adapter(tmp_path / "lora", base), Policy(device="cpu")
    first = result_identity(str(lora), policy)
    assert first == result_identity(str(shutil.copytree(lora, tmp_path / "elsewhere" / "lora")), policy)
    file = lora / "adapter_model.safetensors"
    state = load_file(file)
    seen = [first, result_identity(str(base), policy)]
    save_file({name: values + 1 for name, values in state.items()}, file, metadata={"format": "pt"})
    seen.append(result_identity(str(lora), policy))
    save_file(state, file, metadata={"format": "pt"})
    loras.edit(lora, lora_alpha=7)
    seen.append(result_identity(str(lora), policy))
    loras.edit(lora, lora_alpha=6)
    loras.merge(base, lora, 1.0)
    seen.append(result_identity(str(lora), policy))
    told = [(each["weights"], each["files"]) for each in seen]
    assert len({*told}) == len(told)
    assert "weights" in sampled_identity(str(base), policy)
    assert sampled_identity(str(lora), policy) == {}  # of releases that ran no adapters


def test_an_adapter_s_own_tokenizer_goes_before_its_base_model_s(build: Build, tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "lora", build("llama"))
    assert describe(str(lora)).tokenizer == str(build("llama"))
    models.make_tokenizer().save_pretrained(lora)
    file = lora / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<pad>"}))
    assert describe(str(lora)).tokenizer == str(lora)
    with Engine.from_pretrained(str(lora), policy={"device": "cpu"}) as engine:
        assert engine.tokenizer.eos_token == "<pad>"
    (lora / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"tokenizer_config.json and no vocabulary"):
        describe(str(lora))


def test_base_and_adapter_are_found_in_the_hubs_cache(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `from_pretrained` finds them, by their ids and without a network."""
    from huggingface_hub import constants

    def put(model: str, files: Path) -> None:
        folder = tmp_path / f"models--{model.replace('/', '--')}"
        shutil.copytree(files, folder / "snapshots" / "0123")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    put("org/base", build("llama"))
    put("org/lora", save_adapter(tmp_path / "lora", build("llama"), base_model_name_or_path="org/base"))
    assert describe("org/lora").tokenizer == "org/base"
    by_directory = save_adapter(tmp_path / "other", build("llama"))
    found, expected = (loaded(Path(each), torch.float32) for each in ("org/lora", by_directory))
    assert all(found[name].equal(values) for name, values in expected.items())


def test_a_file_that_comes_to_the_base_model_is_seen(build: Build, tmp_path: Path) -> None:
    base = Path(shutil.copytree(build("llama"), tmp_path / "base"))
    lora = save_adapter(tmp_path / "lora", base)
    before = describe(str(lora))
    assert before == describe(str(lora))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    after = describe(str(lora))
    assert (Path(after.path) / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (Path(before.path) / "chat_template.jinja").exists()


def test_a_kept_directory_that_is_not_whole_is_made_again(build: Build, tmp_path: Path) -> None:
    """Without its adapter it would be the base model; with another's files, another model."""
    lora = save_adapter(tmp_path / "lora", build("llama"))
    path = locate(str(lora)).path
    whole = {file.name: file.resolve() for file in path.rglob("*") if not file.is_dir()}
    spoil: list[Callable[[], Any]] = [
        lambda: shutil.rmtree(path / "flexgen-adapter"),
        (path / "tokenizer.json").unlink,
        lambda: [(path / "config.json").unlink(), (path / "config.json").symlink_to(build("opt") / "config.json")],
        lambda: [(path / "config.json").unlink(), (path / "config.json").write_text("{}")],
        lambda: (path / "chat_template.jinja").write_text("{{ messages }}"),
        lambda: [shutil.rmtree(path), path.write_text("")],
    ]
    for each in spoil:
        each()
        assert locate(str(lora)).path == path
        assert {file.name: file.resolve() for file in path.rglob("*") if not file.is_dir()} == whole
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(lora: Path) -> None:
        file = lora / "adapter_model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})

    return changed


def tell(**changes: Any) -> Callable[[Path], None]:
    return lambda lora: loras.edit(lora, **changes)


Q = f"base_model.model.{loras.QUERIES[1]}"
CORRECT = "correct base_model_name_or_path"
BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "DoRA": (tell(use_dora=True), ("the field 'use_dora'", "merge_and_unload")),
    "another kind": (tell(peft_type="IA3"), ("peft_type 'IA3'",)),
    "biases": (tell(bias="lora_only"), ("bias 'lora_only'",)),
    "PiSSA": (tell(init_lora_weights="pissa"), ("init_lora_weights 'pissa'",)),
    "some layers": (tell(layers_to_transform=0), ("the field 'layers_to_transform'",)),
    "a field to come": (tell(twist=0.5), ("the field 'twist'",)),
    "a revision": (tell(revision="v2"), ("revision 'v2'",)),
    "a rank that is none": (tell(r=0), ("'r' is 0", "at least 1")),
    "a scale that is none": (tell(alpha_pattern={"q_proj": "x"}), ("'alpha_pattern[q_proj]' is 'x'",)),
    "a scale that is not finite": (tell(lora_alpha=float("nan")), ("'lora_alpha' is nan", "a finite number")),
    "a pattern's that is not": (tell(alpha_pattern={"q_proj": float("-inf")}), ("'alpha_pattern[q_proj]' is -inf",)),
    "a pattern that is none": (tell(target_modules="(q_proj"), ("'(q_proj' is no pattern",)),
    "a pattern that is none among others": (tell(alpha_pattern={"(?i)q_proj": 3}), ("'(?i)q_proj' is no pattern",)),
    "a pattern that never ends": (
        tell(target_modules="(.|..|...|....)+[^a-z._0-9]"),
        ("q_proj", "is not decided within 1 s", "without nested repeats"),
    ),
    "a pattern that never compiles": (
        tell(rank_pattern={"((((q{99}){99}){99}){99})": 4}),
        ("its repeats multiply to 96059601, and 100 are allowed",),
    ),
    "a pattern of approximate names": (tell(exclude_modules="(?:q_prom){e<=1}"), ("{ at position 10",)),
    "no base model": (tell(base_model_name_or_path=None), ("names no base model", "base_model_name_or_path")),
    "a base model that is not there": (
        tell(base_model_name_or_path="./nowhere"),
        ("names the base model './nowhere', which cannot be found", "does not exist", "write where it is"),
    ),
    "an adapter as base model": (
        lambda lora: loras.edit(lora, base_model_name_or_path=str(lora)),
        ("which is an adapter itself",),
    ),
    "another rank": (tell(r=8), ("lora_A.weight is [4, 64] instead of [8, 64]", CORRECT)),
    "matrices of another model": (
        rewrite(lambda state: state.update({f"{Q}.lora_B.weight": torch.zeros(96, 4)})),
        (f"{loras.QUERIES[1]}.lora_B.weight is [96, 4] instead of [64, 4]", CORRECT),
    ),
    "names of another model": (
        rewrite(lambda state: [state.update({n.replace("layers", "blocks"): state.pop(n)}) for n in [*state]]),
        ("model.blocks.0.self_attn.q_proj.lora_A.weight has no counterpart", CORRECT),
    ),
    "one of two": (rewrite(lambda state: state.pop(f"{Q}.lora_B.weight")), (f"lacks {Q}.lora_B.weight",)),
    "a layer is missing": (
        rewrite(lambda state: [state.pop(name) for name in [*state] if name.startswith(Q)]),
        ("lacks 1 of 3 parameters", loras.QUERIES[1]),
    ),
    "more than is told": (tell(target_modules=["k_proj"]), ("q_proj.lora_A.weight is none of what",)),
    "codes": (
        rewrite(lambda state: state.update({f"{Q}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)})),
        (f"{Q}.lora_A.weight is int8",),
    ),
    "a whole module is missing": (tell(modules_to_save=["lm_head"]), ("lacks 1 of 4 parameters", "lm_head.weight")),
    "no weights": (lambda lora: (lora / "adapter_model.safetensors").unlink(), ("no adapter_model.safetensors",)),
    "a pickle": (
        lambda lora: (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin"),
        ("holds adapter_model.bin", "save the adapter as adapter_model.safetensors"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_merged_is_refused_in_a_line(name: str, build: Build, tmp_path: Path) -> None:
    change, parts = BROKEN[name]
    lora = save_adapter(tmp_path / "lora", build("llama"))
    change(lora)
    with pytest.raises(EngineError) as caught:
        check_model(describe(str(lora)), Policy(device="cpu"))
    assert "\n" not in str(caught.value)
    assert str(lora) in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_base_models_that_nothing_can_be_added_to_are_refused(build: Build, tmp_path: Path) -> None:
    """Packed matrices, experts that are one parameter, a head that is the token embedding."""
    packers.save_packed(
        tmp_path / "packed",
        "llama",
        packers.float8_blocks(8, 16),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]},
    )
    expert = "model.layers.1.block_sparse_moe.experts.2.w1"
    cases = {
        "is quantized": save_adapter(tmp_path / "1", tmp_path / "packed"),
        "is of an expert": save_adapter(tmp_path / "2", build("mixtral"), (expert,)),
    }
    tied = save_adapter(tmp_path / "3", build("llama"), ("lm_head",))
    loras.edit(tied, base_model_name_or_path=str(build("gemma")))
    cases["both are one table"] = tied
    for words, lora in cases.items():
        with pytest.raises(EngineError, match=words):
            check_model(describe(str(lora)), Policy(device="cpu"))


def test_kept_codes_of_the_base_model_are_not_an_adapter_s(build: Build, tmp_path: Path) -> None:
    """Encoded weights outlive the process: they are made anew when the adapter's scale is another."""
    lora, policy = save_adapter(tmp_path / "lora", build("llama")), {"device": "cpu", "compress-weight": 8}
    job = Job(prompt=[*range(20, 40)], max_new_tokens=0, prompt_logprobs=True)

    def scored() -> list[float | None]:
        with Engine.from_pretrained(str(lora), policy=policy) as engine:
            (done,) = engine.run([job])
            return list(done.prompt_logprobs or ())

    first = scored()
    assert first == scored()
    loras.edit(lora, lora_alpha=12)
    assert first != scored()
