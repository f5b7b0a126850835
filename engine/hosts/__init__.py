"""An engine on many hosts, with the interface of an engine in this process: leases of jobs, and recovery of lost hosts.

It imports `workers` for the ledger, messages and packing, `asking` for the interface of an engine, and `checkpoint` for
the identity that tells whether two hosts have the same model. How messages travel is left to implementations of `Host`.
"""
