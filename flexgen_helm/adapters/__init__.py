"""Models for other evaluation harnesses, each known to its harness once it is imported, and OpenAI's API.

Imports the engine, the harness in question, and of flexgen_helm `planning` and what knows how models think and spell.
"""
