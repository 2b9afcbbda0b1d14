"""Each text once: exact and near copies, repeated passages, and what evaluation sets ask, removed."""
