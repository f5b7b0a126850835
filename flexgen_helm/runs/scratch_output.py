"""A temporary HELM output directory that reads the data of another one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from helm.benchmark.runner import get_benchmark_output_path, set_benchmark_output_path

from engine.errors import ConfigError

_DATA = "scenarios"
"""The folder in every output directory where HELM stores the scenarios' downloads."""


@contextmanager
def scratch_output(data_of: Path, *, keeps_downloads: bool = False) -> Iterator[Path]:
    """Create a directory for runs, with the scenarios' data of the output directory `data_of`, if it has some.

    HELM uses it as its output directory meanwhile. If `data_of` has no data, downloads are lost, unless
    `keeps_downloads` stores them there. Raises `ConfigError` if that is impossible.
    """
    before = get_benchmark_output_path()
    with tempfile.TemporaryDirectory(prefix="flexgen-helm-") as folder:
        scratch, data = Path(folder), (data_of / _DATA).absolute()
        is_made = keeps_downloads and not data.is_dir()
        made = [each for each in (data, *data.parents) if not each.exists()] if is_made else []
        if made:
            try:
                data.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{data} cannot be made: {error.strerror}; name another --output-path") from None
        if data.is_dir():
            (scratch / _DATA).symlink_to(data, target_is_directory=True)
        set_benchmark_output_path(str(scratch))
        try:
            yield scratch
        finally:
            set_benchmark_output_path(before)
            for each in made:
                with suppress(OSError):  # it is no longer empty
                    each.rmdir()
