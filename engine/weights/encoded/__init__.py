"""Weights that are stored encoded: decoded on the device, and cached on disk for later processes.

It imports what `weights` may import.
"""
