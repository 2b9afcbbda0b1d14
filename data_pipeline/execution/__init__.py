"""How the stages run: executors, stages that are skipped when finished, counts and progress."""
