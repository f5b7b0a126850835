"""How the large matrices of layers are stored where a policy encodes them: rounded in groups, or bit for bit.

Imports what `kernels` may import.
"""
