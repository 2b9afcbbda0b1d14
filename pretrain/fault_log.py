"""``RUN/faults.jsonl``: one JSON object for everything that went wrong, across all starts of a run.

Each has ``time`` (seconds since 1970), ``kind``, ``rank`` and ``host`` of the process that wrote it, and what the kind
needs: ``skipped_step`` (step, ranks with their samples), ``roll_back``, ``silent_rank``, ``no_progress``,
``slow_rank``, ``storage``. Lines are never dropped, not even by a resume: it is a record of events, not of steps.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

FILE_NAME = "faults.jsonl"


class FaultLog:
    """Appends to the file of one run directory. Any thread of any rank may write: a line is one write."""

    def __init__(self, run_path: Path, rank: int) -> None:
        self.path, self.rank, self.host = run_path / FILE_NAME, rank, socket.gethostname()

    def add(self, kind: str, **details: Any) -> None:
        """Write one line. A run directory that cannot be written is said on the console, and ends nothing here."""
        entry = {"time": time.time(), "kind": kind, "rank": self.rank, "host": self.host, **details}
        line = (json.dumps(entry) + "\n").encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"{self.path}: {error.strerror}; not recorded: {line.decode().strip()}", file=sys.stderr, flush=True)
