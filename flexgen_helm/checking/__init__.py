"""Whether a model runs here, and as in plain transformers: what its files say, and a small random copy of it, tried.

It imports no other room, and no HELM.
"""
