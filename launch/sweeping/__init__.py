"""A sweep: many runs of one grid. What a cell is, where it lies, who runs it, what came of it."""
