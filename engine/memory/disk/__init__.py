"""Files of the disk tier: opened past the page cache, read and written by several threads.

It imports only the ground: errors, job, policy.
"""
