"""Weights that are stored encoded: expanded on the device, and kept on disk from one process to the next.

Imports what `weights` may import.
"""
