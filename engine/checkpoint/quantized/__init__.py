"""Quantized checkpoints: what their configuration says, and which packed matrices they hold."""
