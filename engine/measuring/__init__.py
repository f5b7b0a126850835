"""Measures what a machine can do: the rates of the device, its link, the host and its disk.

It imports memory, kernels and planning.
"""
