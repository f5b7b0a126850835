"""The text of tokens: special tokens around a prompt, decoding, and the end of a completion.

It imports schedule.
"""
