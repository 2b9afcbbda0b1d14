"""Make a checkpoint ready for other ranks, ahead of time: ``python launch/reshape.py --run runs/NAME``.

A run that is started with another number of ranks or another expert-parallel size converts its checkpoint by itself,
in one process while all the others wait. For a large one that is expensive: this does the same before, on one machine
with memory for a few parameters, in several processes. The original stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.environment import name_accelerator
from launch.settings import EXIT_FINISHED, BadInputError, exit_with_status


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint so that any number of ranks can resume it.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run directory, as in runs/ice_tiny")
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest intact one")
    parser.add_argument("--workers", type=int, default=1, help="processes; each needs memory for a parameter's states")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise BadInputError(f"--workers {options.workers}: must be 1 or more")
    # Importing torch takes seconds; a mistake on the command line should not wait for it.
    from pretrain.checkpoint import find_damage, newest_valid_checkpoint, step_folder_name
    from pretrain.checkpoint.state import read_record
    from pretrain.checkpoint.universal import find_universal, make_universal

    name_accelerator()
    folder = options.run / "checkpoints"
    if options.step is None:
        checkpoint = newest_valid_checkpoint(folder)
    else:
        checkpoint = folder / step_folder_name(options.step)
        damage = find_damage(checkpoint)
        if damage is not None:
            raise BadInputError(f"{checkpoint}: {damage}; name a --step whose checkpoint is intact")
    topology = read_record(checkpoint)["identity"]["topology"]
    if not topology["zero_stage"]:
        raise BadInputError(
            f"{checkpoint}: was saved with parallel.zero_stage = 0; only those of stages 1 to 3 can be converted"
        )
    universal = find_universal(checkpoint)
    if universal is not None and find_damage(universal) is None:
        print(f"{universal}: is there already")
        return EXIT_FINISHED
    universal = make_universal(checkpoint, options.workers)
    print(
        f"{universal}: made from {topology['ranks']} ranks with expert_parallel_size = "
        f"{topology['expert_parallel_size']}; any number of ranks can resume from it"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    exit_with_status(main)
