"""A grid of runs: ``python launch/sweep.py configs/scaling/ice_small.json``.

Expands sizes x tokens (or isoFLOP levels) x mean loops x seeds into cells, and trains each with the ordinary command:
one after another, ``--parallel N`` at once, or as a Slurm job array (``--executor slurm``). Finished cells are skipped
and broken ones resumed, so the same command is typed again after whatever happened. Everything lies in ``runs/NAME/``:
a run directory for each cell, and ``results.jsonl`` with a row for each finished one. The cells are one W&B group.

    --dry-run        show the cells and their budgets, or with --executor slurm the command; start nothing
    --collect        start nothing; write results.jsonl of what is finished, and show it
    --evaluate 1,2,4,8   evaluate what is finished at these depths, write results.jsonl with the losses; trains nothing
    --cell INDEX     for slurm/scaling.sh: print the configuration of one cell for training to start with

Exit status: 0 all cells finished; 75 asked to stop, cells saved; 78 wrong configuration or data, of the sweep (then
nothing was started) or of a cell (the others went on); 1 a cell ended too often without getting on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.live import Live

from launch.settings import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    BadInputError,
    exit_with_status,
    load_settings,
)
from launch.sweeping.depths import evaluate_cells
from launch.sweeping.folder import CellFolder, open_cells
from launch.sweeping.grid import expand_grid
from launch.sweeping.local import CellRun, LocalRunner, Stop
from launch.sweeping.lock import sweep_lock
from launch.sweeping.results import RESULTS, write_results
from launch.sweeping.settings import SweepSettings
from launch.sweeping.table import SweepTable, final_bits

COLLECT_WAIT_SECONDS = 60.0  # for another process that collects


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train every cell of a grid.")
    parser.add_argument("config", type=Path, metavar="FILE", help="such as configs/scaling/ice_small.json")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument("--parallel", type=int, metavar="N", help="cells at once; default the file's")
    parser.add_argument("--site", type=Path, metavar="FILE", help="with --executor slurm: see launch/submit.py")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--dry-run", action="store_true", help="show what would be done")
    modes.add_argument("--collect", action="store_true", help="write the results of what is finished")
    modes.add_argument("--evaluate", type=depth_list, metavar="1,2,4,8", help="losses of finished cells by depth")
    modes.add_argument("--cell", type=int, metavar="INDEX", help="prepare one cell, print its configuration's path")
    return parser.parse_args(arguments)


def depth_list(text: str) -> list[int]:
    """Loops of at least 1, as ``1,2,4,8`` says; for argparse."""
    depths = sorted({int(part) for part in text.split(",")})
    if depths[0] < 1:
        raise ValueError
    return depths


def load_sweep(path: Path, parallel: int | None = None) -> tuple[SweepSettings, list[CellFolder]]:
    """The sweep in ``path`` and its cells, all checked; ``BadInputError`` says what is wrong."""
    sweep = load_settings(SweepSettings, path, [] if parallel is None else [f"parallel={parallel}"])
    return sweep, open_cells(expand_grid(sweep, path), path)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_arguments(arguments)
    if options.executor == "slurm":
        from launch.submit import submit_sweep

        return submit_sweep(options.config, options.site, options.dry_run, options.parallel)
    sweep, folders = load_sweep(options.config, options.parallel)
    # A row is longer than a terminal that nobody has widened.
    console = Console(width=None if sys.stdout.isatty() else 170, soft_wrap=True, highlight=False)
    if options.cell is not None:
        return _prepare_cell(options.config, folders, options.cell)
    if options.dry_run or options.collect:
        if options.collect:
            with sweep_lock(sweep.path, COLLECT_WAIT_SECONDS):
                write_results(sweep.path, folders)
        runs = [CellRun(folder, "finished" if folder.is_finished() else "waiting") for folder in folders]
        console.print(SweepTable(runs, console).render())
        return EXIT_FINISHED
    if options.evaluate is not None:
        with sweep_lock(sweep.path, COLLECT_WAIT_SECONDS):
            return evaluate_depths(sweep, folders, options.evaluate, console)
    with sweep_lock(sweep.path):
        return run_local(sweep, folders, console)


def evaluate_depths(sweep: SweepSettings, folders: list[CellFolder], depths: list[int], console: Console) -> int:
    """Evaluate the finished cells at ``depths``, and collect; the exit status. The caller holds the sweep's lock."""

    def collect() -> None:
        write_results(sweep.path, folders)

    collect()
    refused = evaluate_cells(folders, depths, console.print, collect)
    console.print(f"results: {sweep.path / RESULTS}")
    return EXIT_BAD_INPUT if refused else EXIT_FINISHED


def run_local(sweep: SweepSettings, folders: list[CellFolder], console: Console) -> int:
    """Train the cells on this machine; returns the exit status. The caller holds the sweep's lock."""

    def finished(folder: CellFolder) -> None:
        write_results(sweep.path, folders)
        console.print(f"{folder.cell.name}: finished, {final_bits(folder):.4f} bits a byte")

    with Stop() as stop:
        runner = LocalRunner(sweep, folders, console.print, finished)
        done = sum(run.state == "finished" for run in runner.runs)
        console.print(f"{sweep.path}: {len(folders)} cells, {done} finished; {sweep.parallel} at once")
        write_results(sweep.path, folders)
        table = SweepTable(runner.runs, console)
        if console.is_terminal:
            with Live(table, console=console, refresh_per_second=1, transient=True):
                runner.run(stop)
        else:
            runner.run(stop)
        console.print(table.render())
    console.print(f"results: {sweep.path / RESULTS}")
    states = {run.state for run in runner.runs}
    if states == {"finished"}:
        return EXIT_FINISHED
    if stop.count:
        console.print("asked to stop; the same command goes on from what is saved")
        return EXIT_PREEMPTED
    return EXIT_BAD_INPUT if "refused" in states else EXIT_FAILED


def _prepare_cell(source: Path, folders: list[CellFolder], index: int) -> int:
    """Print the path of the plan of cell ``index``; nothing when the cell is finished."""
    if not 0 <= index < len(folders):
        raise BadInputError(f"--cell {index}: {source} has cells 0 to {len(folders) - 1}; submit that array again")
    if not folders[index].is_finished():
        print(folders[index].prepare())
    return EXIT_FINISHED


if __name__ == "__main__":
    exit_with_status(main)
