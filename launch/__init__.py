"""Processes, settings files, clusters and plans; never tensors."""
