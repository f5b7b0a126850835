"""`flexgen-helm doctor`: shows what this machine has and what is missing; imports no HELM."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from flexgen_helm import engine_problem
from flexgen_helm.terminal.errors import UsageError
from flexgen_helm.terminal.installation import torch_problem, torchvision_problem, version
from flexgen_helm.terminal.parser import Parser

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. "missing" costs a feature, "broken" costs every run."""

    status: Status
    what: str
    detail: str


def examine(offload_dir: str) -> Iterator[Finding]:
    """Look at everything that a run needs, cheapest first."""
    yield _python()
    if version("flexgen-helm") is None:
        yield Finding("broken", "flexgen-helm", "not installed in this environment; run `pip install -e .`")
    else:
        yield from _packages()
    engine_fault = engine_problem()
    yield _verdict("engine package", engine_fault, "flexgen-helm's own")
    if engine_fault is None:
        yield _host_memory()
    torch_fault = torch_problem()
    yield _verdict("import torch", torch_fault, "works")
    if torch_fault is None:
        have = version("torchvision")
        detail = f"{have} works with torch" if have else "not installed, and not needed"
        yield _verdict("torchvision", torchvision_problem(), detail)
        yield from _devices()
        if engine_fault is None:
            yield from _tokenizers()
            yield _profile()
            yield _kept_weights()
    yield _entry_point()
    yield _disk(offload_dir)
    yield _nltk()


def _verdict(what: str, problem: str | None, fine: str) -> Finding:
    return Finding("broken", what, problem) if problem else Finding("ok", what, fine)


def _python() -> Finding:
    have = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("ok", "python", have)
    return Finding("broken", "python", f"{have}; make the environment with Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """Compare installed packages with this package's requirements."""
    for text in importlib.metadata.requires("flexgen-helm") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = version(wanted.name)
        cure = f"run `pip install '{wanted.name}{wanted.specifier}'`"
        if have is None:
            yield Finding("broken", wanted.name, f"not installed; {cure}")
        elif not wanted.specifier.contains(have, prereleases=True):
            yield Finding("broken", wanted.name, f"{have} is not {wanted.specifier}; {cure}")
        else:
            yield Finding("ok", wanted.name, have)


def _devices() -> Iterator[Finding]:
    import torch

    from engine.memory import accelerator

    if not accelerator.devices():
        reason = "this torch is built for the CPU" if torch.version.cuda is None else "no usable CUDA device"
        yield Finding("missing", "GPU", f"{reason}; models run on the CPU, in float32")
        return
    for device in accelerator.devices():
        try:
            found = accelerator.memory(device)
        except RuntimeError as error:
            yield Finding("broken", f"GPU {device}", " ".join(str(error).split())[:160])
            continue
        assert found is not None
        shown = f"{_gb(found[0])} of {_gb(found[1])} free"
        yield Finding("ok", f"GPU {device}", f"{accelerator.name_of(device)}, {shown}")


def _tokenizers() -> Iterator[Finding]:
    """Packages for tokenizers that come without a tokenizer.json."""
    from engine.checkpoint.tokenizer_packages import FORMATS

    for each in FORMATS:
        if problem := each.problem():
            detail = f"tokenizers published in this format alone cannot be read; run `{each.cure}` ({problem})"
            yield Finding("missing", each.name, detail)
        else:
            yield Finding("ok", each.name, ", ".join(f"{name} {version(name)}" for name in each.packages))


def _profile() -> Finding:
    from engine.errors import ConfigError
    from engine.planning.hardware_profile import HardwareProfile

    try:
        profile = HardwareProfile.load()
    except ConfigError as error:
        return Finding("missing", "hardware profile", str(error))
    return Finding("ok", "hardware profile", f"measured on {profile.date} with torch {profile.torch}")


def _kept_weights() -> Finding:
    from engine.weights.encoded.kept import weights_directory

    folder = weights_directory()
    files = [*folder.glob("*/*.safetensors")]
    total, models = sum(file.stat().st_size for file in files), len({file.parent for file in files})
    return Finding("ok", "encoded weights", f"{_gb(total)} of {models} models in {folder}; they may be deleted")


def _entry_point() -> Finding:
    names = {point.value for point in importlib.metadata.entry_points(group="helm")}
    if "flexgen_helm.plugin" in names:
        return Finding("ok", "helm entry point", "helm-run finds this package")
    return Finding(
        "missing", "helm entry point", "helm-run does not find this package; install it with `pip install -e .`"
    )


def _host_memory() -> Finding:
    from engine.planning.host_limits import host_limits

    limits = host_limits()
    shown = f"{_gb(limits.available)} of {_gb(limits.total)} available"
    if limits.may_grow:
        present = _gb(limits.machine_present)
        shown += f"; the machine has {present}: `flexgen-helm doctor --profile` tries how much of that it gives"
    return Finding("ok", "host memory", shown)


def _disk(offload_dir: str) -> Finding:
    folder = Path(offload_dir).expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("broken", "offload-dir", f"{folder} cannot be written; name another with --offload-dir")
    return Finding("ok", "offload-dir", f"{_gb(shutil.disk_usage(there).free)} free at {folder}")


def _nltk() -> Finding:
    """Look where nltk looks: HELM's F1 and BLEU metrics need this and fail only after all inference."""
    if version("nltk") is None:
        return Finding("missing", "nltk punkt_tab", "nltk is not installed")
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except (LookupError, OSError):
        cure = "run `python -m nltk.downloader punkt_tab`, or set NLTK_DATA to a folder that has it"
        return Finding("missing", "nltk punkt_tab", f"HELM's F1 and BLEU metrics need it; {cure}")
    return Finding("ok", "nltk punkt_tab", "there")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def doctor_parser() -> Parser:
    """The command line of `flexgen-helm doctor`."""
    examples = ("flexgen-helm doctor", "flexgen-helm doctor --profile --offload-dir /data/offload")
    parser = Parser(prog="flexgen-helm doctor", description=__doc__, examples=examples)
    parser.add_argument(
        "--offload-dir", default=".", help="directory for offloaded data, whose disk is examined (default: .)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="measure device, link, host and disk, and keep the results as the machine's hardware profile",
    )
    return parser


def doctor(arguments: list[str]) -> int:
    """Print the findings, or measure; 1 if something essential is broken."""
    args = doctor_parser().parse_args(arguments)
    if args.profile:
        if problem := engine_problem() or torch_problem():
            raise UsageError(problem)
        from flexgen_helm.commands.profiling import profile

        return profile(args.offload_dir)
    worst = 0
    for finding in examine(args.offload_dir):
        print(f"{finding.status:<8} {finding.what:<17} {finding.detail}", flush=True)
        worst |= finding.status == "broken"
    return int(worst)
