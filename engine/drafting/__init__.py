"""Speculative decoding with a small draft model, whose tokens the large model checks in its next sweep.

It imports none of the modules next to the rooms: the caller passes in what computes a sweep.
"""
