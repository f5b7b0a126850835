"""Matrices and experts as quantized checkpoints hold them, and what they stand for."""
