"""An output directory of HELM's that is gone afterwards and reads the data that another one holds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helm.benchmark.runner import get_benchmark_output_path, set_benchmark_output_path

_DATA = "scenarios"
"""Where HELM keeps what scenarios download, in every output directory."""


@contextmanager
def scratch_output(data_of: Path) -> Iterator[Path]:
    """Make a directory for runs, with the scenarios' data of the output directory `data_of`, if it has some.

    HELM takes it for its output directory meanwhile. Downloads that are missing there are made anew, and lost.
    """
    before = get_benchmark_output_path()
    with tempfile.TemporaryDirectory(prefix="flexgen-helm-") as folder:
        scratch, data = Path(folder), (data_of / _DATA).absolute()
        if data.is_dir():
            (scratch / _DATA).symlink_to(data, target_is_directory=True)
        set_benchmark_output_path(str(scratch))
        try:
            yield scratch
        finally:
            set_benchmark_output_path(before)
