"""OpenAI's API: parses request bodies, answers them by jobs of the engine, and makes OpenAI's response bodies.

It imports no HELM.
"""
