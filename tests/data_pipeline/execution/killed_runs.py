"""Runs of the pipeline that kill themselves at a chosen moment; a program of test_kills.py.

Reads jobs from standard input, one JSON object a line, and answers each with the status of a forked process that ran
it, since importing the pipeline anew for every run would take longer than the runs:

    settings  the data set's settings
    kill      when to SIGKILL the whole process group: null; [text, n] for the n-th change that this process is about
              to make to a path, in the output folder, that contains the text; [pattern, 0] for when a path appears,
              which workers may have made
    events    a file that gets the paths of all changes, one a line, or null
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.config import DataSettings
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.progress import Reporter
from data_pipeline.preparation import prepare

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Which argument is the path that changes; of a rename both ends matter, and the end is what says more.
PATH_ARGUMENT = {"open": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}


def changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change."""
    if event not in PATH_ARGUMENT or (event == "open" and not arguments[2] & WRITING):
        return None
    path = arguments[PATH_ARGUMENT[event]]
    return os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else None


def kill_when_there(output: Path, pattern: str) -> None:
    """Wait for a path, then end everything."""
    while not next(output.glob(pattern), None):
        time.sleep(0.001)
    os.killpg(0, signal.SIGKILL)


def run(job: dict[str, Any]) -> None:
    """Prepare the data set, or die on the way."""
    os.setsid()
    settings = DataSettings.model_validate(job["settings"])
    output = os.path.abspath(settings.output)
    text, left = job["kill"] or ("", -1)
    if left == 0:
        threading.Thread(target=kill_when_there, args=(Path(output), text), daemon=True).start()
    events = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        path = changed_path(event, arguments)
        if path is None or not path.startswith(output):
            return
        name = path.removeprefix(output)
        events.append(name)
        if text in name:
            left -= 1
            if left == 0:  # never, if it was to begin with
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    with open(os.devnull, "w") as sink:
        prepare(settings, LocalExecutor(settings.execution.workers), Reporter(Console(file=sink)))
    if job["events"]:
        Path(job["events"]).write_text("\n".join(events))


def main() -> None:
    """Serve jobs until the input ends."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
