"""Files of the disk tier: opened for direct I/O, read and written by several threads.

It imports only the ground: errors, job, policy.
"""
