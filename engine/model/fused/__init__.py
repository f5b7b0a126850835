"""Modules and functions of a model's layers that are one kernel on a card: found out by calling them."""
