"""Engines in separate processes, with the interface of an engine in this process.

It imports `memory`, `planning`, `schedule` and `verification` for the types of messages, `asking` for the interface of
an engine, and `checkpoint` for the tokenizer. The program of such a process is `engine/worker.py`, next to the rooms:
it opens an engine.
"""
