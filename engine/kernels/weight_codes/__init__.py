"""Codecs for the large matrices of layers, as a policy asks for them: rounded in groups, or lossless.

It imports what `kernels` may import.
"""
