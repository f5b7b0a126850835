"""All fuzz targets, and those that are cheap enough to run with the tests."""

from __future__ import annotations

import command_lines
import files
import model_files

DOORS = [*files.DOORS, *model_files.DOORS, *command_lines.DOORS]
