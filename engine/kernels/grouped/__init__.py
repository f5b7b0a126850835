"""Mixture of experts: rows sorted by expert, a product for each expert's rows, and the weighted sum of each token.

It imports memory.
"""
