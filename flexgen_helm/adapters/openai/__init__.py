"""OpenAI's API: bodies of requests read, answered by jobs of the engine, and written as OpenAI writes them.

Imports no HELM.
"""
