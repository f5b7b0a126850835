"""The policy: where weights, KV cache and activations are kept, and how large a sweep may be (YAML, strict)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from engine.errors import ConfigError, did_you_mean, shown
from engine.memory.device_names import check_stages, parse_device
from engine.reading import expand_home, find_file, parse_bytes, read_yaml

PadMode = Literal["bucket"] | int | None
Bits = Literal[4, 8] | None
WeightCodes = Literal[4, 8, "lossless"] | None

DTYPES = ("auto", "float32", "float16", "bfloat16")
_LONGEST_PATH = 4095
"""The longest path, in bytes, on Linux."""


def only_bfloat16(dtype: str) -> str:
    """The message that a lossless codec rejects weights of this dtype: of float16's 16 bits it would leave 15.1."""
    return f"compress-weight: lossless takes bfloat16, and the model is computed in {dtype}; leave it out, or set dtype"


OWN_DRAFT = "own"
"""What `draft-model` says for the MTP layer in the model's own checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Percents of something on the three tiers; they sum to 100."""

    gpu: float
    cpu: float
    disk: float = 0.0

    @classmethod
    def parse(cls, value: Any, where: str) -> Share:
        """Read `{gpu: 20, cpu: 80, disk: 0}`; missing keys are 0."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {shown(value)} is not a mapping such as {{gpu: 20, cpu: 80, disk: 0}}")
        for key in value:
            if key not in ("gpu", "cpu", "disk"):
                raise ConfigError(f"{where}: unknown key {shown(key)}{did_you_mean(str(key), ('gpu', 'cpu', 'disk'))}")
        parts = {key: _percent(value.get(key, 0), f"{where}.{key}") for key in ("gpu", "cpu", "disk")}
        total = sum(parts.values())
        if abs(total - 100.0) > 1e-6:
            raise ConfigError(f"{where}: percents sum to {total:g}, not 100")
        return cls(**parts)

    def as_mapping(self) -> dict[str, float]:
        """The form that `parse` reads."""
        return {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}


def _percent(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {shown(value)} is not a number of percents")
    if not 0 <= value <= 100:
        raise ConfigError(f"{where}: {shown(value)} percent is not between 0 and 100")
    return float(value)


def shares_from_percent(percent: Any, where: str = "percent") -> tuple[Share, Share, Share]:
    """FlexGen's six percents (weights gpu/cpu, cache gpu/cpu, activations gpu/cpu); the rest of each is on disk."""
    if not isinstance(percent, list | tuple) or len(percent) != 6:
        count = len(percent) if isinstance(percent, list | tuple) else 1
        raise ConfigError(
            f"{where}: needs six numbers (weights gpu cpu, cache gpu cpu, activations gpu cpu), got {count}"
        )
    values = [_percent(value, f"{where}[{i}]") for i, value in enumerate(percent)]
    shares = []
    for name, gpu, cpu in zip(("weights", "cache", "activations"), values[::2], values[1::2], strict=True):
        if gpu + cpu > 100:
            raise ConfigError(f"{where}: {name} gpu {gpu:g} + cpu {cpu:g} = {gpu + cpu:g} percent, more than 100")
        shares.append(Share(gpu=gpu, cpu=cpu, disk=100.0 - gpu - cpu))
    return shares[0], shares[1], shares[2]


_MOST_PAD = 1 << 17
"""The most tokens to which a prompt may be padded, even for models without a window."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Placement and sizes of a run. None means: chosen by the engine from the available memory."""

    gpu_batch_size: int | None = None
    """The most sequences in a micro-batch (an upper bound)."""
    num_gpu_batches: int | None = None
    """The most micro-batches in a sweep (an upper bound)."""
    weights: Share | None = None
    kv_cache: Share | None = None
    activations: Share | None = None
    pad_to_seq_len: PadMode = None
    """None: packed, no padding; "bucket": to the next bucket; an int: every prompt to this many tokens."""
    compress_weight: WeightCodes = None
    """The bits that weights are rounded to, or "lossless"."""
    compress_cache: Bits = None
    cpu_cache_compute: bool = False
    pin_weight: bool = True
    overlap: bool = True
    share_prefix: bool = True
    batch_invariant: bool = False
    """Whether answers have the same bits regardless of other jobs, at a cost."""
    draft_model: str | None = None
    """The hub id or directory of a small model with the same tokenizer that drafts tokens, or `own`: the MTP layer in
    the model's checkpoint. It changes no answer."""
    dtype: str = "auto"
    device: str | tuple[str, ...] = "auto"
    """One device, several of one type, "all" of the best type, or "auto": one, or all like GPUs of a machine."""
    gather_weights: bool | None = None
    """Whether several devices each store and transfer a part of the weights, and gather them; else each all."""
    stages: int = 1
    """The number of devices that each have some consecutive layers, through which every job passes."""
    gpu_memory: int | None = None
    """The bytes that torch may reserve on the device (on the CPU: bytes of the device tier)."""
    cpu_memory: int | None = None
    """The bytes of page-locked and placed host memory."""
    offload_dir: str | None = None
    """The directory of the disk tier; needed as soon as any share is on disk."""

    @classmethod
    def load(cls, spec: Policy | str | Path | Mapping[str, Any] | None = "auto") -> Policy:
        """Make a policy from `"auto"`, the name of a shipped one, a YAML file, a mapping, or a Policy."""
        if isinstance(spec, Policy):
            return spec
        if spec is None or spec == "auto":
            return cls()
        if isinstance(spec, Mapping):
            return cls.from_mapping(spec)
        if not isinstance(spec, str | Path):
            raise ConfigError(f"policy: {shown(spec)} is neither a name, a file nor a mapping")
        return cls.from_mapping(read_policy_yaml(spec), where=str(spec))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "policy") -> Policy:
        """Read the keys of the policy YAML; unknown keys are errors that name the nearest one."""
        known = {field.name.replace("_", "-") for field in fields(cls)} | {"percent"}
        for key in mapping:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {shown(key)}{did_you_mean(str(key), known)}")
        if "percent" in mapping and {"weights", "kv-cache", "activations"} & set(mapping):
            raise ConfigError(f"{where}: give either percent or weights/kv-cache/activations, not both")
        values = {key.replace("-", "_"): value for key, value in mapping.items() if key != "percent"}
        for key in ("weights", "kv_cache", "activations"):
            if values.get(key) is not None:
                values[key] = Share.parse(values[key], f"{where}: {key.replace('_', '-')}")
        if mapping.get("percent") is not None:
            shares = shares_from_percent(mapping["percent"], f"{where}: percent")
            values["weights"], values["kv_cache"], values["activations"] = shares
        for key in ("gpu_memory", "cpu_memory"):
            if values.get(key) is not None:
                values[key] = parse_bytes(values[key], f"{where}: {key.replace('_', '-')}")
        if values.get("compress_weight") != "lossless" and "compress_weight" in values:
            values["compress_weight"] = _bits(values["compress_weight"], f"{where}: compress-weight", ", lossless")
        if "compress_cache" in values:
            values["compress_cache"] = _bits(values["compress_cache"], f"{where}: compress-cache")
        if "device" in values:
            values["device"] = parse_device(values["device"], f"{where}: device")
        if values.get("gather_weights") == "auto":
            values["gather_weights"] = None
        if values.get("offload_dir") is not None:
            values["offload_dir"] = _directory(values["offload_dir"], f"{where}: offload-dir")
        policy = cls(**values)
        policy.check(where)
        return policy

    def check(self, where: str = "policy") -> None:
        """Raise `ConfigError` for invalid values."""
        for name in ("gpu_batch_size", "num_gpu_batches"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                key = name.replace("_", "-")
                raise ConfigError(f"{where}: {key} {shown(value)} is not a whole number of at least 1 and below 2^31")
        pad = self.pad_to_seq_len
        if pad is not None and pad != "bucket" and not _is_count(pad):
            raise ConfigError(f'{where}: pad-to-seq-len {shown(pad)} is neither null, "bucket" nor a number of tokens')
        if isinstance(pad, int) and pad > _MOST_PAD:
            raise ConfigError(f"{where}: pad-to-seq-len {pad} is more than {_MOST_PAD:,}, the most rows of a sweep")
        for name in ("cpu_cache_compute", "pin_weight", "overlap", "share_prefix", "batch_invariant"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {name.replace('_', '-')} {shown(value)} is not true or false")
        if self.draft_model is not None and not (isinstance(self.draft_model, str) and self.draft_model.strip()):
            raise ConfigError(f"{where}: draft-model {shown(self.draft_model)} is no name of a model")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{where}: unknown dtype {shown(self.dtype)}{did_you_mean(str(self.dtype), DTYPES)}")
        parse_device(self.device, f"{where}: device")
        if self.gather_weights is not None and not isinstance(self.gather_weights, bool):
            raise ConfigError(f"{where}: gather-weights {shown(self.gather_weights)} is none of auto, true, false")
        if self.gather_weights and isinstance(self.device, str) and self.device not in ("auto", "all"):
            raise ConfigError(f"{where}: gather-weights needs several devices; device {self.device} is one")
        check_stages(self.stages, self.device, self.gather_weights, self.draft_model, where)
        if self.batch_invariant and self.cpu_cache_compute and (self.kv_cache is None or self.kv_cache.cpu != 100):
            raise ConfigError(
                f"{where}: batch-invariant with cpu-cache-compute needs kv-cache: {{cpu: 100}}, since a sequence on "
                "another tier would be attended to by another processor"
            )
        if self.offload_dir is None and self.uses_disk:
            raise ConfigError(f"{where}: a share is on disk but there is no offload-dir; name a directory for it")

    def check_window(self, window: int | None) -> None:
        """Raise `ConfigError` for settings that a model of this window cannot be run with; None is no limit."""
        pad = self.pad_to_seq_len
        if isinstance(pad, int) and window is not None and pad > window:
            raise ConfigError(
                f"pad-to-seq-len {pad} is more than the model's window of {window}; give {window} or less"
            )

    @property
    def weight_bits(self) -> Bits:
        """The bits that weights are rounded to; None where they are not rounded."""
        return None if self.compress_weight == "lossless" else self.compress_weight

    @property
    def uses_disk(self) -> bool:
        """Whether any spelled-out share is on disk."""
        return any(share is not None and share.disk > 0 for share in (self.weights, self.kv_cache, self.activations))

    def as_mapping(self) -> dict[str, Any]:
        """The mapping that `from_mapping` reads back as this policy; defaults are left out."""
        mapping: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                if isinstance(value, Share):
                    value = value.as_mapping()
                elif isinstance(value, tuple):
                    value = list(value)
                elif item.name in ("gpu_memory", "cpu_memory"):
                    value = f"{value / 1000:.17g}kB"
                mapping[item.name.replace("_", "-")] = value
        return mapping


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _directory(value: Any, where: str) -> str:
    text = str(value) if isinstance(value, str | Path) else ""
    if not text or "\0" in text or len(text.encode()) > _LONGEST_PATH:
        raise ConfigError(f"{where}: {shown(value)} is not the name of a directory")
    return str(expand_home(text, ConfigError, where))


def _bits(value: Any, where: str, others: str = "") -> Bits:
    if value is None or value is False:
        return None
    if value is True or value == 4:
        return 4
    if value == 8:
        return 8
    raise ConfigError(f"{where}: {shown(value)} is none of false, 4, 8{others}")


def policy_directories() -> list[Path]:
    """The directories of shipped policies: inside the installed package first, next to it (a checkout) second."""
    root = Path(__file__).resolve().parent.parent
    return [root / "flexgen_helm" / "configs" / "policies", root / "configs" / "policies"]


def read_policy_yaml(spec: str | Path) -> Mapping[str, Any]:
    """Read a policy file, or the shipped policy of that name; `ConfigError` if there is neither."""
    path = expand_home(spec, ConfigError, "policy")
    if path.suffix not in (".yaml", ".yml") and not find_file(path, ConfigError):
        shipped = {file.stem: file for folder in policy_directories() for file in folder.glob("*.yaml")}
        if str(spec) not in shipped:
            known = [*shipped, "auto"]
            raise ConfigError(f"no policy file or shipped policy {shown(str(spec))}{did_you_mean(str(spec), known)}")
        path = shipped[str(spec)]
    content = read_yaml(path, ConfigError, what="policy")
    if content == "auto":
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"policy {path} is not a mapping of keys to values")
    return content
