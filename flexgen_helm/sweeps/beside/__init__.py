"""HELM's part of a suite's runs: making requests and finishing runs, in the command's process or in helper processes.

It imports what `sweeps` imports, and nothing else of `sweeps`.
"""
