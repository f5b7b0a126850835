"""The directory in which a suite's files are prepared; imports nothing, so that a suite's name can be checked."""

SCRATCH = ".partial"
"""The suffix, after the suite's name, of the directory of unfinished files."""
