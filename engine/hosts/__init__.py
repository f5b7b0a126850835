"""An engine on many hosts, asked as one in this process is: who has which jobs, and what follows when a host is lost.

Imports `workers`, whose ledger, messages and packing it uses, `asking` for what an engine offers, and `checkpoint` for
what tells whether two hosts have the same model. How messages travel is the business of whoever implements `Host`.
"""
