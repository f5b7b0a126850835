"""adapter_config.json: which matrices of the base model an adapter changes, and by how much.

peft matches names of modules by `re`, which cannot be interrupted: a pattern of repeats in repeats would never end.
They are matched by `regex` here, within a time limit; patterns that the two packages read differently are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import regex  # type: ignore[import-untyped]

from engine.errors import CheckpointError, UnsupportedError, shown
from engine.reading import find_file, read_json_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FOLDER = "flexgen-adapter"
"""The folder, inside a model directory that `locate` made for an adapter, that holds the adapter's two files."""
_MAX_BYTES = 16 << 20
_MOST_CHARACTERS = 10_000
"""The most characters of a pattern of module names."""
_MOST_COPIES = 100
"""The number to which the repetitions of a pattern may multiply: `regex` compiles a copy for each."""
_MATCH_S = 1.0
"""The limit of processor time for one match, in seconds; a usual match takes microseconds."""
_READ_DIFFERENTLY = re.compile(r"\{(?!\d*,?\d*\})|\[:")
"""Syntax that `regex` and `re` read differently: approximate matches and POSIX classes."""
_T = TypeVar("_T")

_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    # Others subtract something from the base model's own weights when the adapter is made, and when it is loaded.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
    "revision": (None, "main"),
}
"""Fields that are supported with these values only."""
_HONOURED = (
    *("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "modules_to_save"),
)
_WITHOUT_EFFECT = (
    *("auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
    "fan_in_fan_out",  # the kind of module decides, as in peft, which corrects what this says
    "layers_pattern",  # says something only beside layers_to_transform, which is refused
)
"""Fields that do not affect the merged weights, or repeat what another field says."""


@dataclass(frozen=True)
class LoraConfig:
    """The parts of an adapter_config.json that affect numbers."""

    file: Path
    """The file that was read, for messages."""
    base: str
    """The base model: a directory or a hub id."""
    rank: int
    alpha: float
    is_rank_stabilized: bool
    """Whether the scale is alpha over the square root of the rank (rsLoRA) instead of alpha over the rank."""
    rank_pattern: Mapping[str, int]
    """Ranks that differ from the default, by a pattern of module names."""
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    """The modules that are changed: a regular expression of whole names, or a list of names and name suffixes."""
    excluded: str | tuple[str, ...]
    """Modules that are left unchanged although `targets` includes them."""
    replaced: tuple[str, ...]
    """The modules that the adapter stores as a whole, as name suffixes."""

    def rank_of(self, module: str) -> int:
        """The inner width of the two matrices of a module, by its name in the base model."""
        return self._of_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor by which the product of a module's two matrices is multiplied."""
        rank, alpha = self.rank_of(module), self._of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilized else alpha / rank

    def replaces(self, module: str) -> bool:
        """Whether the adapter stores a module as a whole, or a module around it."""
        return any(module.endswith(name) or f"{name}." in module for name in self.replaced)

    def changes(self, module: str) -> bool:
        """Whether a module is one whose matrix the adapter changes."""
        is_whole = any(_matches(self.file, _part_of_name(name), module) for name in self.replaced)
        return self._is_among(module, self.targets) and not is_whole and not self._is_among(module, self.excluded)

    def _of_pattern(self, patterns: Mapping[str, _T], module: str, otherwise: _T) -> _T:
        """The value of the first pattern that matches the end of a name, as peft looks it up."""
        found = (value for key, value in patterns.items() if _matches(self.file, _end_of_name(key), module))
        return next(found, otherwise)

    def _is_among(self, module: str, names: str | Iterable[str]) -> bool:
        if isinstance(names, str):
            return bool(names) and _matches(self.file, names, module, whole=True)
        return any(module == name or module.endswith(f".{name}") for name in names)


def read_lora_config(file: Path) -> LoraConfig:
    """Read the fields of an adapter_config.json.

    Raises `CheckpointError` for fields of another type, `UnsupportedError` for an adapter of another kind, and for a
    field that is not understood.
    """
    told = read_json_object(file, CheckpointError, limit=_MAX_BYTES)
    for key, known in _VALUES.items():
        value = told.get(key)
        if not any(value is each or (isinstance(value, str) and value == each) for each in known):
            _refuse(file, f"{key} {shown(value)}")
    understood = {*_VALUES, *_HONOURED, *_WITHOUT_EFFECT}
    # 0 is a layer, where it says something of layers.
    if strange := [key for key, value in told.items() if key not in understood and (value or type(value) is int)]:
        _refuse(file, f"the field {shown(strange[0])}")

    def take(key: str, kind: type[_T] | tuple[type[_T], ...], words: str, default: _T) -> _T:
        value = told.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{file}: {key} is {shown(value)}; {words} is expected there")
        return value

    base = take("base_model_name_or_path", str, "a directory or a hub id", "")
    if not base:
        raise CheckpointError(
            f"{file} names no base model; write the directory or hub id of the model that it was made for as "
            "base_model_name_or_path"
        )
    rank, alpha = take("r", int, "a number of at least 1", 8), take("lora_alpha", (int, float), "a number", 8)
    ranks, alphas = take("rank_pattern", dict, "an object", {}), take("alpha_pattern", dict, "an object", {})
    for key, each in {"r": rank, **{f"rank_pattern[{name}]": each for name, each in ranks.items()}}.items():
        if type(each) is not int or each < 1:
            raise CheckpointError(f"{file}: {shown(key)} is {shown(each)}; a number of at least 1 is expected there")
    for key, each in {"lora_alpha": alpha, **{f"alpha_pattern[{name}]": each for name, each in alphas.items()}}.items():
        is_number = isinstance(each, int | float) and not isinstance(each, bool)
        if not is_number or not math.isfinite(each):
            raise CheckpointError(f"{file}: {shown(key)} is {shown(each)}; a finite number is expected there")
    config = LoraConfig(
        file=file,
        base=base,
        rank=rank,
        alpha=alpha,
        is_rank_stabilized=take("use_rslora", bool, "true or false", False),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        targets=_names(file, "target_modules", told.get("target_modules")),
        excluded=_names(file, "exclude_modules", told.get("exclude_modules")),
        replaced=_list(file, "modules_to_save", told.get("modules_to_save")),
    )
    _check_patterns(config)
    return config


def adapter_folder(path: Path) -> Path | None:
    """The folder of the adapter that changes the weights of a model directory; None if there is none."""
    folder = path / ADAPTER_FOLDER
    return folder if find_file(folder / ADAPTER_CONFIG, CheckpointError) else None


def _refuse(file: Path, what: str) -> NoReturn:
    raise UnsupportedError(
        f"{file}: {what} cannot be merged here; merge the adapter into its base model by peft (merge_and_unload, "
        "save_pretrained), and name that directory"
    )


def _names(file: Path, key: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _list(file, key, value)


def _list(file: Path, key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise CheckpointError(f"{file}: {key} is {shown(value)}; a list of names is expected there")
    return tuple(value)


def _check_patterns(config: LoraConfig) -> None:
    """Raise `CheckpointError` for patterns of names that cannot be matched."""
    for pattern in (config.targets, config.excluded):
        if isinstance(pattern, str):
            _check_pattern(config.file, pattern, pattern)
    for pattern in config.replaced:
        _check_pattern(config.file, pattern, _part_of_name(pattern))
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        _check_pattern(config.file, pattern, _end_of_name(pattern))


def _end_of_name(pattern: str) -> str:
    """The expression by which peft looks up ranks and alphas: the pattern is a name, or its last parts."""
    return rf"(.*\.)?({pattern})$"


def _part_of_name(pattern: str) -> str:
    """The expression by which peft finds modules that are replaced, and modules inside those."""
    return rf"(^|.*\.){pattern}($|\..*)"


def _check_pattern(file: Path, pattern: str, expression: str) -> None:
    """Raise `CheckpointError` unless a pattern from `file`, and the `expression` made of it, can be matched."""
    try:
        if len(pattern) > _MOST_CHARACTERS:
            raise ValueError(f"more than {_MOST_CHARACTERS:,} characters")
        re.compile(pattern)
        re.compile(expression)
        if found := _READ_DIFFERENTLY.search(pattern):
            raise ValueError(f"{found[0]} at position {found.start()} is not understood here")
        if (copies := math.prod(max(1, int(count)) for count in re.findall(r"\{(\d+)", pattern))) > _MOST_COPIES:
            raise ValueError(f"its repeats multiply to {shown(copies)}, and {_MOST_COPIES} are allowed")
        _compiled(expression)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: {shown(pattern)} is no pattern of names of modules ({error})") from None


def _matches(file: Path, expression: str, module: str, *, whole: bool = False) -> bool:
    """Whether the start of a module's name (or, with `whole`, all of it) matches a checked expression.

    Raises `CheckpointError` where the match takes longer than its time limit.
    """
    compiled = _compiled(expression)
    try:
        return (compiled.fullmatch if whole else compiled.match)(module, timeout=_MATCH_S) is not None
    except TimeoutError:
        raise CheckpointError(
            f"{file}: whether the pattern {shown(expression)} matches the module {shown(module)} is not decided within "
            f"{_MATCH_S:.0f} s; write it without nested repeats"
        ) from None


@lru_cache(maxsize=4096)  # more than an adapter has: the cache of `regex` itself holds 500
def _compiled(expression: str) -> Any:
    return regex.compile(expression, regex.VERSION0)
