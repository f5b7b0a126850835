"""Records of suites and runs next to HELM's files, for later commands: when they began, and what computed them.

It imports the rest of `helm`, and `planning`.
"""
