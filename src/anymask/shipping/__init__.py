"""Shipping: a trained sparse network as a file of the size of what is kept, and what runs it.

Importing this package loads neither torch nor NumPy: who only runs a file has no need of the one, and waits for the other later.
"""
