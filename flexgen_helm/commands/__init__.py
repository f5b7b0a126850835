"""Commands: one file for each `flexgen-helm COMMAND`, its flags, its help and what it prints.

The room imports every other one, and nothing but `flexgen_helm.run` imports it. Flags are read before HELM and torch
are imported: both come inside functions.
"""
