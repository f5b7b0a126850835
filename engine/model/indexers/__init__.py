"""Indexers of sparse attention: modules of layers that choose, by index keys, the keys that a token attends to."""
