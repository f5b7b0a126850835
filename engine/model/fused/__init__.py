"""Modules and functions of a model's layers that one kernel can replace, found by calling them."""
