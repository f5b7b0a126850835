"""Measures what a machine can do: rates of the device, its link, the host and its disk.

It imports memory, kernels and planning.
"""
