"""Pictures of what other rooms have found, drawn by matplotlib, which the extra `plot` brings.

The room imports matplotlib inside functions only.
"""
