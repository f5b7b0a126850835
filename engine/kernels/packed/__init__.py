"""Matrices and experts in the packed formats of quantized checkpoints, and their decoding."""
