"""Elementwise operations between matrix products: by torch's functions, or by one fused kernel where a device has it.

It imports memory.
"""
