"""Engines in processes of their own, and what speaks to them as to an engine in this process.

Imports `memory`, `planning`, `schedule` and `verification` for the types of what is told, `asking` for what an engine
offers, and `checkpoint` for the tokenizer. The program that such a process runs is `engine/worker.py`, beside the
rooms: it opens an engine.
"""
