"""Scaling laws from the results of sweeps: ``python launch/fit.py runs/ice_small/results.jsonl``.

Fits, to the held-out losses of all finished runs:

    chinchilla   L(N, D) = E + A N^-alpha + B D^-beta
    looped       L(N, D, T) = E + A (N_once + T^phi N_rec)^-alpha + B D^-beta
    isoflop      parabolas: the best size at each FLOP level and mean depth
    depth        L(T) = L_inf + Z exp(-z T), of each model or size that has enough depths

with bootstrap intervals, the error at the largest size and budget when they are held out, and the best parameters,
tokens and loops at a budget. Prints tables; writes ``fit.json`` and pictures beside the results. What it assumes, and
how to read it: docs/scaling.md.

Chinchilla's law must be found, the others where the runs allow; ``--laws`` names what must be found instead. Exit
status: 0 fitted; 78 the results are not usable, too few, or do not tell the coefficients apart (one line says which).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track

from launch.files import write_json_atomically
from launch.fitting.huber import DELTA
from launch.fitting.runs import COUNTED, LOSS_UNITS, Floats, read_rows
from launch.fitting.study import PARTS, Part, Settings, make_study
from launch.fitting.table import print_study
from launch.settings import EXIT_FINISHED, BadInputError, exit_with_status

OUTPUT = "fit.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fit scaling laws to the results of sweeps.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.jsonl", help="of one sweep or more")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for fit.json and pictures; default beside the results")
    parser.add_argument("--loss", choices=tuple(LOSS_UNITS), default="nats", help="a token, or bits a byte")
    parser.add_argument("--parameters", choices=COUNTED, default="active", help="which ones N counts; default active")
    parser.add_argument("--laws", type=_parts, metavar="A,B", help=f"fit these and no others: {', '.join(PARTS)}")
    parser.add_argument("--loops", type=int, metavar="T", help="only runs trained at this mean depth")
    parser.add_argument(
        "--budget", type=float, action="append", default=[], metavar="FLOPS", help="for the best run; may be repeated"
    )
    parser.add_argument("--most-parameters", type=float, metavar="N", help="a limit for the best run, as for memory")
    parser.add_argument("--resamples", type=int, default=Settings.resamples, metavar="N", help="of the bootstrap")
    parser.add_argument("--level", type=float, default=Settings.level, help="of the intervals; default 0.95")
    parser.add_argument("--huber-delta", type=float, default=DELTA, help="log error from which it counts linearly")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--wandb", choices=("online", "offline", "disabled"), default="disabled")
    parser.add_argument("--wandb-project", default="ice", metavar="NAME")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_arguments(arguments)
    settings = checked_settings(options)
    rows = read_rows(options.results)
    if options.loops is not None:
        depths = sorted({row.mean_loops for row in rows})
        rows = [row for row in rows if row.mean_loops == options.loops]
        if not rows:
            raise BadInputError(f"--loops {options.loops}: no run was trained at it; there are {depths}")
    out: Path = options.out or options.results[0].parent
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from None
    console = Console(width=None if sys.stdout.isatty() else 170, soft_wrap=True, highlight=False)

    def watched(draws: Sequence[Floats], what: str) -> Iterator[Floats]:
        yield from track(draws, description=what, console=console, transient=True, disable=not console.is_terminal)

    study = make_study(rows, settings, watched)
    print_study(study, console)
    from launch.fitting.pictures import draw_study

    pictures = draw_study(study, out)
    write_json_atomically(out / OUTPUT, study.to_json())
    console.print(f"written: {', '.join(str(path) for path in (out / OUTPUT, *pictures))}")
    if options.wandb != "disabled":
        from launch.fitting.tracking import report_to_wandb

        name = f"fit-{options.results[0].resolve().parent.name}"
        report_to_wandb(study, pictures, out, options.wandb, options.wandb_project, name)
    return EXIT_FINISHED


def checked_settings(options: argparse.Namespace) -> Settings:
    """The settings of the study; ``BadInputError`` for what argparse lets through."""
    limits = [] if options.most_parameters is None else [options.most_parameters]
    for name, value, accepted, good in (
        ("resamples", options.resamples, "0 or more", options.resamples >= 0),
        ("level", options.level, "between 0 and 1", 0 < options.level < 1),
        ("huber-delta", options.huber_delta, "above 0, and finite", _is_amount(options.huber_delta)),
        ("seed", options.seed, "0 or more", options.seed >= 0),
        *(("most-parameters", limit, "above 0, and finite", _is_amount(limit)) for limit in limits),
        *(("budget", budget, "above 0, and finite", _is_amount(budget)) for budget in options.budget),
    ):
        if not good:
            raise BadInputError(f"--{name} {value:g}: must be {accepted}")
    settings = Settings(
        unit=options.loss,
        counted=options.parameters,
        budgets=tuple(options.budget),
        most_parameters=options.most_parameters,
        resamples=options.resamples,
        level=options.level,
        delta=options.huber_delta,
        seed=options.seed,
    )
    return settings if options.laws is None else replace(settings, required=options.laws, optional=())


def _is_amount(value: float) -> bool:
    return 0 < value < math.inf


def _parts(text: str) -> tuple[Part, ...]:
    chosen = tuple(part for part in PARTS if part in text.split(","))
    if len(chosen) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted, with commas between: {', '.join(PARTS)}")
    return chosen


if __name__ == "__main__":
    exit_with_status(main)
