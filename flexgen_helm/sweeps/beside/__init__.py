"""HELM's part of a suite's runs, which may be done in processes beside the command's own: making requests, finishing runs.

Imports what the room does, and nothing else of it.
"""
