"""Scaling laws from a sweep's results: what is read, the laws, how they are fitted, and how sure one can be."""
