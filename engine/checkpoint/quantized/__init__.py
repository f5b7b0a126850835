"""Checkpoints that come quantized: what their configuration says, and which packed matrices they hold."""
