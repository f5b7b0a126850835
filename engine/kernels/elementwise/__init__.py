"""What layers compute of rows between products: by torch's functions, and by one kernel each where a device has it.

It imports memory.
"""
