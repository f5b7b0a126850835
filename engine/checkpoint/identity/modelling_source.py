"""The source files of transformers that decide a family's numbers, and their digest."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.checkpoint.config import text_config
from engine.errors import CheckpointError
from engine.reading import find_file, read_bytes

_SHARED = frozenset({"activations", "masking_utils", "modeling_rope_utils", "pytorch_utils", "integrations.moe"})
"""Modules outside of families that decide numbers where a family imports them: activations, masks, rotary
frequencies, products, experts.

The others are plumbing (loading, generation, caches, outputs, documentation), for which the engine has its own or
which compute nothing: most of them change with every release."""
_FAMILY_FILES = ("modeling_", "configuration_")
_MOST_BYTES = 16 << 20


def source_digest(config: Mapping[str, Any]) -> str:
    """The hex digest of the source that decides a model's numbers, by its config.json.

    It is equal for equal files, whatever the package's version. Raises `CheckpointError` where the source is missing.
    """
    digest = hashlib.sha256()
    for name, file in sorted(source_files(config).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(_read(file)).digest())
    return digest.hexdigest()


def source_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """The source files by module name within transformers: the family's, and those it imports that decide numbers."""
    package = _package()
    files: dict[str, Path] = {}
    waiting = [name for kind in _model_types(config) for name in _modules_of(kind, package)]
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        files[name] = package / f"{name.replace('.', '/')}.py"
        waiting += [other for other in _imported(name, files[name]) if _decides(other, package)]
    return files


def _package() -> Path:
    """The directory of transformers, found without importing it."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise CheckpointError("the source of transformers cannot be found; install it as files, not as an archive")
    return Path(spec.origin).parent


def _model_types(config: Mapping[str, Any]) -> list[str]:
    """The model type, and the type of the language model inside a multimodal model."""
    found = [config.get("model_type"), text_config(config).get("model_type")]
    return list(dict.fromkeys(kind for kind in found if isinstance(kind, str)))


def _modules_of(model_type: str, package: Path) -> list[str]:
    """The family's modules: `models.llama.modeling_llama` and `models.llama.configuration_llama` for "llama"."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    family = package / "models" / model_type_to_module_name(model_type)
    if not any(family.glob("modeling_*.py")):
        family = _home_of(model_type, package)
    return [
        f"models.{family.name}.{file.stem}" for start in _FAMILY_FILES for file in sorted(family.glob(f"{start}*.py"))
    ]


def _home_of(model_type: str, package: Path) -> Path:
    """The folder of the family whose class runs a model that has no source of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    name = name if isinstance(name, str) or name is None else name[0]
    for file in sorted((package / "models").glob("*/modeling_*.py")) if name is not None else ():
        if f"\nclass {name}(".encode() in _read(file):
            return file.parent
    raise CheckpointError(
        f"the source of {name or model_type} is not in {package / 'models'}; install transformers with its source files"
    )


def _decides(module: str, package: Path) -> bool:
    """Whether a module of transformers decides numbers of the families that import it."""
    parts = module.split(".")
    is_of_family = (
        parts[0] == "models" and len(parts) == 3 and parts[1] != "auto" and parts[2].startswith(_FAMILY_FILES)
    )
    return module in _SHARED or (is_of_family and find_file(package / f"{'/'.join(parts)}.py", CheckpointError))


def _imported(module: str, file: Path) -> tuple[str, ...]:
    """The modules of transformers that a module imports anywhere, by name within the package."""
    try:
        return _imported_by(module, _read(file))
    except (SyntaxError, ValueError, RecursionError):
        raise CheckpointError(f"{file} is no Python source; install transformers again") from None


@lru_cache(maxsize=32)  # a family's files, which are read again when its weights are open
def _imported_by(module: str, source: bytes) -> tuple[str, ...]:
    return tuple(_imports(module, ast.parse(source)))


def _imports(module: str, tree: ast.Module) -> Iterator[str]:
    here = module.split(".")
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = here[: len(here) - node.level]
        elif (node.module or "").partition(".")[0] == "transformers":
            base = []
        else:
            continue
        told = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
        source = ".".join([*base, *filter(None, told)])
        yield source
        for alias in node.names:
            yield f"{source}.{alias.name}".lstrip(".")
            # a package hands on what its modules define
            if source == "integrations" and alias.name == "use_experts_implementation":
                yield "integrations.moe"


def _read(file: Path) -> bytes:
    return read_bytes(file, CheckpointError, limit=_MOST_BYTES)
