"""Micro-batches as tensors: rows, positions, the groups that attention takes together and their masks.

It imports memory, planning and schedule.
"""
