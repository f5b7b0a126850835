"""Arithmetic whose results have the same bits whatever rows are computed beside them.

It imports memory.
"""
