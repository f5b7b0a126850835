"""Records of suites and runs next to HELM's files, for later commands: when they began, and what made them.

It imports the rest of `helm`, and of other rooms `planning`.
"""
