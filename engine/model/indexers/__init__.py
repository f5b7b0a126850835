"""Indexers of sparse attention: modules that choose, by index keys, the keys that a token attends to."""
