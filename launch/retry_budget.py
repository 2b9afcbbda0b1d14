"""How often a job that ended before its run was finished may start again; asked by ``slurm/common.sh``.

A start *gets on* when the run has a newer committed checkpoint after it than after the start before. Starts that get on
are free, whatever ended them: preemption for a month costs nothing. Those that do not are counted, and after a few in a
row the job stops, so that a crash at the same step, or a full disk, does not burn a cluster for ever. A newly submitted
job begins to count at 0.

The count is in ``RUN/slurm/retries.json``. Two commands, because a count needs to know where the job began::

    retry_budget.py begin --job ID --tasks N --config FILE [--set a.b=value]...   prints the run directory
    retry_budget.py end --job ID --run DIR --retries N --nodes N                  prints "stop" or "retry [NODE,...]"

``begin`` also checks the configuration and its topology (status 78 and one line), before Slurm starts a rank for it.
The nodes that ``end`` prints are those that preflight found bad (``RUN/preflight.json``, key ``bad_hosts``).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pydantic import BaseModel, ConfigDict

from launch.files import write_json_atomically
from launch.settings import EXIT_FINISHED, exit_with_status, load_settings, read_json_object

STATE = Path("slurm", "retries.json")
PREFLIGHT = "preflight.json"
NO_CHECKPOINT = -1
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class RetryState(BaseModel):
    """What a job's next end is compared with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    step: int  # newest committed checkpoint when it was last looked at
    without_progress: int  # ends in a row that found no newer one


def newest_committed_step(run: Path) -> int:
    """The step of the newest checkpoint that has a manifest, or ``NO_CHECKPOINT``."""
    steps = (path.parent.name.removeprefix("step_") for path in run.glob("checkpoints/step_*/manifest.json"))
    return max((int(step) for step in steps if step.isdecimal()), default=NO_CHECKPOINT)


def begin(job: str, run: Path) -> None:
    """Remember where ``job`` began; a start of the same job after the first changes nothing."""
    if (run / STATE).exists() and load_settings(RetryState, run / STATE).job == job:
        return
    _write(run, RetryState(job=job, step=newest_committed_step(run), without_progress=0))


def end(job: str, run: Path) -> RetryState:
    """Count this end of ``job``."""
    state = load_settings(RetryState, run / STATE)
    newest = newest_committed_step(run)
    count = 0 if newest > state.step else state.without_progress + 1
    state = RetryState(job=job, step=max(newest, state.step), without_progress=count)
    _write(run, state)
    return state


def _write(run: Path, state: RetryState) -> None:
    (run / STATE).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(run / STATE, state.model_dump())


def bad_nodes(run: Path, nodes: int) -> list[str]:
    """Slurm's names of the hosts that preflight found bad; none when it says that of all of several nodes.

    A mistake of the configuration looks bad from every node, and a job that may run nowhere waits for ever.
    """
    if not (run / PREFLIGHT).exists():
        return []
    hosts = read_json_object(run / PREFLIGHT).get("bad_hosts", [])
    names = sorted({str(host).partition(".")[0] for host in hosts})
    usable = [name for name in names if _HOST.fullmatch(name)]
    return [] if len(usable) >= nodes > 1 else usable


def main(arguments: list[str] | None = None) -> int:
    """The two commands."""
    parser = argparse.ArgumentParser(description="Decide whether a job may start again.", allow_abbrev=False)
    parser.add_argument("command", choices=("begin", "end"))
    parser.add_argument("--job", required=True, metavar="ID", help="Slurm's number of the job")
    parser.add_argument("--tasks", type=int, default=1, help="begin: ranks of the job; the rest is as for training")
    parser.add_argument("--run", type=Path, help="end: the run directory")
    parser.add_argument("--retries", type=int, default=3, help="end: starts in a row that need not get on")
    parser.add_argument("--nodes", type=int, default=1, help="end: nodes of the job")
    options, training_arguments = parser.parse_known_args(arguments)
    if options.command == "begin":
        print(_begin_run(options.job, options.tasks, training_arguments))
        return EXIT_FINISHED
    if options.run is None or training_arguments:
        parser.error("end needs --run DIR, and nothing of the training's arguments")
    state = end(options.job, options.run)
    if state.without_progress > options.retries:
        print(
            f"error: {state.without_progress} starts in a row ended without a checkpoint after step {state.step}; "
            "not tried again. Mend what the log says, and submit again",
            file=sys.stderr,
        )
        print("stop")
    else:
        print(" ".join(["retry", ",".join(bad_nodes(options.run, options.nodes))]).strip())
    return EXIT_FINISHED


def _begin_run(job: str, tasks: int, training_arguments: list[str]) -> Path:
    """Check the configuration of a training command for ``tasks`` ranks, and return its run directory."""
    from pretrain.config import TrainingConfig, check_topology
    from pretrain.main import parse_arguments

    options = parse_arguments(training_arguments)
    config = load_settings(TrainingConfig, options.config, options.overrides)
    check_topology(config, tasks, str(options.config))
    begin(job, config.run.path)
    return config.run.path


if __name__ == "__main__":
    exit_with_status(main)
