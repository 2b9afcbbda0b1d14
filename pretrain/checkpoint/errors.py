"""What ends a run from the side of its checkpoints. Each message is the one line the user sees; exit status 1."""


class CheckpointError(Exception):
    """The run cannot go on as far as its checkpoints are concerned; what was committed is untouched."""


class SaveFailedError(CheckpointError):
    """Too many saves in a row could not be written."""


class StaleRunError(CheckpointError):
    """A later start of the same run has taken over its directory: this process must commit nothing more."""
