"""Runs: turns a command line into HELM's run specs, with their models and entries, checks them and executes them.

It imports `terminal`, `planning`, `workers`, `helm`, `data_wrangling` and `judging`; parsing flags needs neither HELM
nor torch.
"""
