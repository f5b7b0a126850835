"""HELM's part of a suite's runs: making requests and finishing runs, here or in processes beside the command's own.

Imports what the room does, and nothing else of it.
"""
