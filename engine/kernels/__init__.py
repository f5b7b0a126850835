"""Number formats and the kernels that use them: codecs, packed matrices, kernels for device and host.

It imports memory.
"""
