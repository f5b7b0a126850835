"""What suites and runs leave of themselves beside HELM's files, for later commands: when they began, what made them.

Imports the rest of `helm`, and of other rooms `planning`.
"""
