"""What a run needs, before a GPU burns: ``python launch/plan.py --config configs/ice_1t.json --gpus 2048``.

Prints parameters by part, memory of a rank by kind, FLOPs a token, bytes on each wire, the time of a step and what the
run costs; says whether it fits and what would make it; and looks for the fastest settings on this cluster and for the
smallest cluster. ``--json`` and ``--picture`` write the same for machines and for eyes. ``--all`` prints one row for
each configuration in ``configs/``. What is assumed and what was checked against what: docs/plan.md.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from launch.files import write_json_atomically
from launch.planning.gpus import DEFAULT_GPU, GPUS
from launch.planning.report import Plan, make_plan
from launch.planning.run import planned_run
from launch.planning.table import overview_table, print_plan
from launch.settings import EXIT_FINISHED, BadInputError, exit_with_status, load_settings

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("ice_1b", "ice_3b", "ice_10b", "ice_50b", "ice_100b", "ice_500b", "ice_1t")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Plan a run: memory, FLOPs, bytes on the wire, time and cost.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="such as configs/ice_1t.json")
    what.add_argument("--all", action="store_true", help="a row for each of the seven sizes, on its Slurm nodes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides", help="override one setting"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="default what slurm/NAME.sh asks for, else one node")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU, help=f"default {DEFAULT_GPU}")
    parser.add_argument("--price", type=float, metavar="PER_GPU_HOUR", help="to print a cost, in your currency")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG of memory by kind here")
    parser.add_argument("--no-search", action="store_true", help="plan the settings as they are and nothing else")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        check_options(options)
        make_plans(options)
    except OSError as error:
        raise BadInputError(f"{error.filename}: {error.strerror}; name another file") from None
    except OverflowError as error:
        raise BadInputError(f"{options.config}: too large to plan ({error}); take smaller settings") from None
    return EXIT_FINISHED


def make_plans(options: argparse.Namespace) -> None:
    """Plan, print, and write what is asked for."""
    paths = [ROOT / "configs" / f"{name}.json" for name in VARIANTS] if options.all else [options.config]
    plans = [plan_of(path, options) for path in paths]
    if options.all:
        # A row is longer than a terminal that nobody has widened.
        console = Console(width=None if sys.stdout.isatty() else 170)
        console.print(overview_table(plans))
    else:
        print_plan(plans[0], Console(soft_wrap=True))
    if options.json is not None:
        write_json_atomically(options.json, [plan.to_json() for plan in plans] if options.all else plans[0].to_json())
    if options.picture is not None:
        from launch.planning.picture import draw_memory

        draw_memory(plans, options.picture)


def check_options(options: argparse.Namespace) -> None:
    """Refuse, before anything is worked out, what argparse lets through."""
    if options.gpus is not None and options.gpus < 1:
        raise BadInputError(f"--gpus {options.gpus}: must be at least 1")
    if options.price is not None and not 0 <= options.price < math.inf:
        raise BadInputError(f"--price {options.price:g}: must be 0 or more, and finite")
    for name in ("json", "picture"):
        path: Path | None = getattr(options, name)
        if path is not None and path.is_dir():
            raise BadInputError(f"--{name} {path}: is a folder; name a file")
        if path is not None and not path.parent.is_dir():
            raise BadInputError(f"--{name} {path}: there is no folder {path.parent}; make it first")


def plan_of(path: Path, options: argparse.Namespace) -> Plan:
    """The plan of the configuration in ``path``; ``BadInputError`` when it cannot run on so many GPUs."""
    # It brings torch along; the arithmetic does without.
    from pretrain.config import TrainingConfig, check_topology

    config = load_settings(TrainingConfig, path, options.overrides)
    if config.model.core != "ice":
        raise BadInputError(f"{path}: model.core = {config.model.core}: the plan knows core = ice only")
    gpu = GPUS[options.gpu]
    gpus = (slurm_gpus(config.run.name) or gpu.per_node) if options.gpus is None else options.gpus
    check_topology(config, gpus, str(path))
    dtype_bytes = 4 if config.precision.dtype == "fp32" else 2
    return make_plan(planned_run(config, gpus, dtype_bytes), gpu, options.price, search=not options.no_search)


def slurm_gpus(name: str) -> int | None:
    """GPUs that ``slurm/NAME.sh`` asks for; None when there is no such script."""
    script = ROOT / "slurm" / f"{name}.sh"
    if not script.is_file():
        return None
    asked = dict(re.findall(r"^#SBATCH --(nodes|gpus-per-node)=(\d+)", script.read_text(encoding="utf-8"), re.M))
    return int(asked["nodes"]) * int(asked["gpus-per-node"])


if __name__ == "__main__":
    exit_with_status(main)
