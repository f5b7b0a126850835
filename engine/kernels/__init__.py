"""Number formats and the code that is run for them: codecs, packed matrices, kernels for device and host.

It imports memory.
"""
