"""The judge's part of a suite."""
