"""Each text once: identical and nearly identical documents removed."""
