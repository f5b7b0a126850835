"""All doors, and those of them that are cheap enough to be looked through in every run of the tests."""

from __future__ import annotations

import command_lines
import files
import model_files

DOORS = [*files.DOORS, *model_files.DOORS, *command_lines.DOORS]
