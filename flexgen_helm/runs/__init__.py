"""Runs: from a command line to HELM's run specs, with the models and entries that it names, checked and carried out.

The room imports terminal, planning, helm and data_wrangling; reading flags needs neither HELM nor torch.
"""
