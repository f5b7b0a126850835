"""The directory in which a suite's files are prepared; imports nothing, so that a suite's name can be checked."""

SCRATCH = ".partial"
"""What the directory of unfinished files has behind the suite's name."""
