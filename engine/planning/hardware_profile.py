"""The measured rates of a machine in strict YAML: one file per machine, and shipped ones. Imports no torch.

All rates are per second: bytes, or floating-point operations (an addition or a multiplication each).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError, did_you_mean, shown
from engine.memory.paths import cache_directory
from engine.memory.replaced import replace_text
from engine.planning.host_limits import host_limits
from engine.planning.machine import Machine, this_machine
from engine.reading import expand_home, find_file, read_yaml

HOST_DTYPES = ("bfloat16", "float16", "float32")
"""The dtypes for which attention on the host is measured."""
_CURE = "run `flexgen-helm doctor --profile`"


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Rates of a device, its link, its host and a disk; on a CPU the device is the host, and the link a copy there."""

    machine: Machine
    device_name: str
    device_memory_bytes: int
    dtype: str
    """The dtype of matrix products and of attention on the device."""
    torch: str
    """The torch version of the measurement."""
    date: str
    """The day of the measurement, as YYYY-MM-DD."""
    to_device_bytes_s: float
    """Copies from page-locked host memory, with nothing else running."""
    from_device_bytes_s: float
    both_ways_bytes_s: float
    """The sum of both directions while both run at once (on a CPU, one after the other)."""
    gemm_flop_s: Mapping[int, float]
    """Products by rows of the left side: `[rows, n] @ [n, n]`, weights read from device memory."""
    device_bytes_s: float
    """Bytes read and written by a copy within device memory."""
    prefill_attention_flop_s: float
    """Causal attention of new tokens among themselves; masked pairs are not counted."""
    decode_attention_bytes_s: float
    """Keys and values read, with one new token for each of many sequences."""
    host_bytes_s: float
    """Bytes read from host memory by all cores."""
    host_attention_bytes_s: Mapping[str, float]
    """Like `decode_attention_bytes_s`, on the host with all cores, by dtype."""
    host_attention_beside_copy_bytes_s: Mapping[str, float]
    """Like `host_attention_bytes_s`, during a copy to the device; on a CPU, equal to it."""
    disk_read_bytes_s: float
    disk_write_bytes_s: float
    links_together_bytes_s: float | None = None
    """Like `to_device_bytes_s`, for each GPU while all like GPUs copy the same memory; None with a single one."""
    gather_bytes_s: float | None = None
    """Bytes that reach each GPU from all the others, when all gather all parts; None with a single GPU."""

    computes_bfloat16: bool | None = None
    """Whether the device has native bfloat16; a profile without the field has it, like all but old GPUs."""

    @property
    def cores(self) -> int:
        """The number of cores that the process may use."""
        return self.machine.cores

    @property
    def host_memory_bytes(self) -> int:
        """The total host memory, or the container's limit."""
        return self.machine.host_memory_bytes

    def computed_in(self, asked: str, own: str) -> str:
        """The dtype in which a model of dtype `own` is computed under a policy's dtype `asked`.

        All 16-bit dtypes are as fast as the measured one.
        """
        if asked != "auto":
            return asked
        takes_own = own == "bfloat16" and self.dtype == "float16" and self.computes_bfloat16 is not False
        return own if takes_own else self.dtype

    @classmethod
    def load(cls, spec: str | Path | None = None) -> HardwareProfile:
        """Read a shipped profile by its name, a file, or, for None, the stored profile of this machine.

        For this machine, the current memory is used, within the current limits, including what it was found to grow to.
        Raises `ConfigError` when there is none, when it was measured on another machine (only for None), or when the
        file is invalid.
        """
        if spec is not None:
            path = _named(spec)
            return cls.from_mapping(_read(path), where=f"hardware profile {path.name}")
        here = this_machine()
        path = _where_kept(here)
        profile = cls.from_mapping(_read(path), where=f"hardware profile {path}")
        if profile.machine.key != here.key:
            raise ConfigError(f"{path} is a profile of another machine: {profile.machine}; {_CURE}")
        return profile._of_now()

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "hardware profile") -> HardwareProfile:
        """Read the keys of the YAML form; unknown and missing keys, and rates that are not positive, are errors."""
        values = _values(cls, mapping, where)
        machine = _values(Machine, _mapping(values["machine"], f"{where}: machine"), f"{where}: machine")
        machine["accelerators"] = _names(machine["accelerators"], f"{where}: machine: accelerators")
        machine["processor"] = _text(machine["processor"], f"{where}: machine: processor")
        for name in ("cores", "host_memory_bytes"):
            machine[name] = _count(machine[name], f"{where}: machine: {_key(name)}")
        values["machine"] = Machine(**machine)
        values["device_memory_bytes"] = _count(values["device_memory_bytes"], f"{where}: device-memory-bytes")
        if isinstance(values["date"], datetime.date):  # what YAML makes of one without quotes
            values["date"] = values["date"].isoformat()
        for name in ("device_name", "dtype", "torch", "date"):
            values[name] = _text(values[name], f"{where}: {_key(name)}")
        if values["dtype"] not in HOST_DTYPES:
            raise ConfigError(f"{where}: unknown dtype {values['dtype']!r}{did_you_mean(values['dtype'], HOST_DTYPES)}")
        if values["computes_bfloat16"] not in (None, True, False):
            raise ConfigError(f"{where}: computes-bfloat16: {shown(values['computes_bfloat16'])} is not true or false")
        values["gemm_flop_s"] = _by_rows(values["gemm_flop_s"], f"{where}: gemm-flop-s")
        for name in ("host_attention_bytes_s", "host_attention_beside_copy_bytes_s"):
            values[name] = _by_dtype(values[name], f"{where}: {_key(name)}")
        for item in fields(cls):
            if item.type == "float" or (item.type == "float | None" and values[item.name] is not None):
                values[item.name] = _rate(values[item.name], f"{where}: {_key(item.name)}")
        return cls(**values)

    def _of_now(self) -> HardwareProfile:
        memory = host_limits().grown_to(self.host_memory_bytes).total
        return replace(self, machine=replace(self.machine, host_memory_bytes=memory))

    def as_mapping(self) -> dict[str, Any]:
        """The mapping that `from_mapping` reads back as this profile."""
        mapping = {_key(item.name): value for item in fields(self) if (value := getattr(self, item.name)) is not None}
        machine = {_key(item.name): getattr(self.machine, item.name) for item in fields(Machine)}
        mapping["machine"] = {**machine, "accelerators": list(self.machine.accelerators)}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}

    def save(self, path: Path | None = None) -> Path:
        """Write the YAML form to `path` (default: where `load()` looks for it), atomically; returns the path.

        Raises `ConfigError` when it cannot be written.
        """
        path = path or kept_path(self.machine)
        text = yaml.safe_dump(self.as_mapping(), sort_keys=False, width=120)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(
                path, f"# Measured by `flexgen-helm doctor --profile`; bytes and operations per second.\n{text}"
            )
        except OSError as error:
            raise ConfigError(_not_kept(path, error)) from None
        return path


def kept_path(machine: Machine) -> Path:
    """The file that stores the profile of `machine`."""
    return cache_directory() / f"hardware-{machine.key}.yaml"


def _where_kept(here: Machine) -> Path:
    """The file that stores the profile of this machine; raises `ConfigError` where there is none.

    Earlier file names held a digest of the memory, too: such files are identified by their content.
    """
    path, another = kept_path(here), None
    if find_file(path, ConfigError):
        return path
    found: list[tuple[str, Path]] = []
    for path in sorted(cache_directory().glob("hardware-*.yaml")):
        try:
            profile = HardwareProfile.from_mapping(_read(path))
        except ConfigError:
            continue
        if profile.machine.key == here.key:
            found.append((profile.date, path))
        else:
            another = another or f"profile of another machine: {path} is of {profile.machine}, this is {here}; {_CURE}"
    if found:
        return max(found)[1]
    # Home directories are shared, and machines change.
    raise ConfigError(another or f"there is no hardware profile of this machine in {cache_directory()}; {_CURE}")


def _not_kept(path: Path, error: OSError) -> str:
    return f"cannot keep the hardware profile {path}: {error.strerror}; set XDG_CACHE_HOME to a writable directory"


def _named(spec: str | Path) -> Path:
    """The file `spec` names, or the shipped profile of that name: in the installed package first, then next to it."""
    path = expand_home(spec, ConfigError, "hardware profile")
    if path.suffix in (".yaml", ".yml") or find_file(path, ConfigError):
        return path
    root = Path(__file__).resolve().parents[2]
    folders = (root / "flexgen_helm" / "configs" / "hardware", root / "configs" / "hardware")
    shipped = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    if str(spec) not in shipped:
        raise ConfigError(f"no file or shipped hardware profile {str(spec)!r}{did_you_mean(str(spec), shipped)}")
    return shipped[str(spec)]


def _read(path: Path) -> Mapping[str, Any]:
    return _mapping(read_yaml(path, ConfigError, what="hardware profile"), f"hardware profile {path}")


def _key(name: str) -> str:
    return name.replace("_", "-")


def _values(kind: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of all fields of `kind`, by field."""
    known = {_key(item.name): item.name for item in fields(kind)}
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
    needed = [_key(item.name) for item in fields(kind) if item.default is MISSING]
    if missing := [key for key in needed if key not in mapping]:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; {_CURE} to measure again")
    return {name: mapping.get(key) for key, name in known.items()}


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {shown(value)} is not a mapping of keys to values")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {shown(value)} is not a text")
    return value


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {shown(value)} is not a list of names")
    return tuple(_text(name, where) for name in value)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {shown(value)} is not a whole number of at least 1")
    return value


def _rate(value: Any, where: str) -> float:
    try:
        if not isinstance(value, bool | bytes):
            rate = float(value)  # YAML takes 12e9 for a text
            if 0 < rate < math.inf:
                return rate
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{where}: {shown(value)} is not a positive number per second")


def _by_rows(value: Any, where: str) -> dict[int, float]:
    rates = {_count(rows, where): _rate(rate, f"{where}: {rows}") for rows, rate in _mapping(value, where).items()}
    if not rates:
        raise ConfigError(f"{where}: no number of rows was measured")
    return dict(sorted(rates.items()))


def _by_dtype(value: Any, where: str) -> dict[str, float]:
    mapping = _mapping(value, where)
    for key in mapping:
        if key not in HOST_DTYPES:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(str(key), HOST_DTYPES)}")
    if missing := [name for name in HOST_DTYPES if name not in mapping]:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; {_CURE} to measure again")
    return {name: _rate(mapping[name], f"{where}: {name}") for name in HOST_DTYPES}
