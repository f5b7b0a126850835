"""Finds out what a model's own forward does apart from calling its layers."""
