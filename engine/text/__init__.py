"""Text of tokens: special tokens around a prompt, decoding, and where a completion ends.

It imports schedule.
"""
