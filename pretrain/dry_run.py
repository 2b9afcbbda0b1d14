"""``--dry-run``: everything a run would be, without allocating a weight.

Validates the configuration, builds the model on the meta device, and prints parameters, tokens and the DeepSpeed
configuration. The data set is looked at when it is there; a cluster's data need not lie on the machine that plans.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.dataset.manifest import MANIFEST_NAME
from launch.environment import discover_place
from launch.settings import EXIT_FINISHED, BadInputError
from model.parameters import PARTS, cache_bytes, count_parameters
from model.precision import choose_precision
from pretrain.config import TrainingConfig, check_topology
from pretrain.engine import deepspeed_config


def dry_run(config: TrainingConfig, source: Path, ranks: int | None) -> int:
    """Print the plan of ``config`` for ``ranks`` ranks; returns the exit status."""
    place = discover_place()
    world_size, assumed = _ranks_to_plan_for(config, source, ranks, place.world_size)
    if not place.is_first:
        return EXIT_FINISHED
    console = Console(soft_wrap=True)
    console.print(f"{source}: valid", highlight=False)
    console.print(_parameter_table(config))
    tokens_per_step = config.data.global_batch_size * config.data.sequence_length
    why = " (the smallest for this expert-parallel size; choose with --ranks)" if assumed else ""
    is_prepared = (Path(config.data.path) / MANIFEST_NAME).is_file()
    facts = {
        "run directory": config.run.path,
        "ranks": f"{world_size}{why}",
        "gradient accumulation steps": config.grad_accum_steps(world_size),
        "tokens a step": f"{tokens_per_step:,}",
        "steps": f"{config.schedule.steps:,}",
        "tokens in all": f"{tokens_per_step * config.schedule.steps:,}",
        "loops": f"{config.loop.distribution}, mean {config.mean_loops}, gradients through "
        f"{config.loop.grad_loops or 'all'}",
        "data set": f"{config.data.path}{'' if is_prepared else ' (not here)'}",
    }
    precision = choose_precision(config.precision.dtype, _device_type())
    facts["precision here"] = f"{precision.name} ({precision.reason})"
    for name, value in facts.items():
        console.print(f"{name:28} {value}", highlight=False)
    console.print(_cache_table(config))
    console.print("DeepSpeed configuration", highlight=False)
    console.print_json(json.dumps(deepspeed_config(config, world_size, precision)))
    return EXIT_FINISHED


def _ranks_to_plan_for(config: TrainingConfig, source: Path, asked: int | None, started: int) -> tuple[int, bool]:
    """The number of ranks, and whether it was assumed.

    What was asked for with ``--ranks`` must fit. What the launcher happened to start on the machine that plans need
    not: then the plan is for the smallest number that the expert-parallel size allows.
    """
    if asked is not None:
        check_topology(config, asked, str(source))
        return asked, False
    try:
        check_topology(config, started, str(source))
    except BadInputError:
        smallest = config.parallel.expert_parallel_size
        check_topology(config, smallest, str(source))
        return smallest, True
    return started, False


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cache_table(config: TrainingConfig) -> Table:
    """What generation would remember in 16 bits, under each policy the model can be read with."""
    policies = ["gated"] if config.model.kv_policy == "gated" else ["per_loop", "ring", "last"]
    table = Table(title=f"decoding cache at {config.mean_loops} loops, 16 bits")
    table.add_column("kv_policy")
    for column in ("a token", "whatever the length", f"at {config.model.max_seq_len:,} tokens"):
        table.add_column(column, justify="right")
    for policy in policies:
        name = f"ring of {config.model.kv_ring_size}" if policy == "ring" else policy
        try:
            size = cache_bytes(config.model, config.mean_loops, kv_policy=policy)
        except ValueError as refused:  # a ring whose loops see different windows
            table.add_row(name, str(refused))
            continue
        whole = size.constant + size.per_token * config.model.max_seq_len
        table.add_row(name, *map(_readable_bytes, (size.per_token, size.constant, whole)))
    return table


def _readable_bytes(number: int) -> str:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number} B"


def _parameter_table(config: TrainingConfig) -> Table:
    count = count_parameters(config.model, config.mean_loops)
    table = Table(title=f"parameters of {config.run.name}")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    for part in PARTS:
        if parameters := getattr(count, part):
            table.add_row(part.replace("_", " "), f"{parameters:,}")
    table.add_section()
    table.add_row("total", f"{count.total:,}")
    table.add_row("active a token", f"{count.active:,}")
    table.add_row("active a token in one loop of the core", f"{count.active_per_loop:,}")
    table.add_row(f"executed a token, {config.mean_loops} loops", f"{count.executed:,}")
    return table
