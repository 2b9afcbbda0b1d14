"""``--dry-run``: everything a run would be, without allocating a weight.

Validates the configuration and prints tokens, data, the plan of ``launch/plan.py`` (parameters, memory, FLOPs, traffic
and time, on its default GPU) and the DeepSpeed configuration. The data set is looked at when it is there; a cluster's
data need not lie on the machine that plans.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from data_pipeline.dataset.manifest import MANIFEST_NAME
from launch.environment import discover_place
from launch.planning.gpus import DEFAULT_GPU, GPUS
from launch.planning.report import Plan, make_plan
from launch.planning.run import planned_run
from launch.planning.table import print_plan
from launch.settings import EXIT_FINISHED, BadInputError
from model.parameters import cache_bytes, count_parameters
from model.precision import PrecisionChoice, choose_precision
from model.remat import once_policy
from pretrain.config import TrainingConfig, check_topology
from pretrain.engine import deepspeed_config, fp8_choice

if TYPE_CHECKING:
    from pretrain.data import Sampler


def dry_run(config: TrainingConfig, source: Path, ranks: int | None) -> int:
    """Print the plan of ``config`` for ``ranks`` ranks; returns the exit status."""
    place = discover_place()
    world_size, assumed = _ranks_to_plan_for(config, source, ranks, place.world_size)
    if not place.is_first:
        return EXIT_FINISHED
    console = Console(soft_wrap=True)
    console.print(f"{source}: valid", highlight=False)
    why = " (the smallest for this expert-parallel size; choose with --ranks)" if assumed else ""
    tokens_per_step = config.data.global_batch_size * config.data.sequence_length
    missing = [path for path in config.data.folders if not (Path(path) / MANIFEST_NAME).is_file()]
    sampler = None if missing else _open_sampler(config)
    total_samples = config.data.global_batch_size * config.schedule.steps
    # Where a stage shortens sequences only the plan knows; it needs the data.
    total_tokens = tokens_per_step * config.schedule.steps
    if sampler is not None:
        total_tokens = sampler.plan.tokens_before(total_samples)
    facts = {
        "run directory": config.run.path,
        "ranks": f"{world_size}{why}",
        "gradient accumulation steps": config.grad_accum_steps(world_size),
        "tokens a step": f"{tokens_per_step:,}",
        "steps": f"{config.schedule.steps:,}",
        "tokens in all": f"{total_tokens:,}",
        "loops": f"{config.loop.distribution}, mean {config.mean_loops}, gradients through "
        f"{config.loop.grad_loops or 'all'}",
        "kept for the backward": _remat(config),
        "data set": f"{config.data.path or 'tasks'}{' (not here)' if config.data.path in missing else ''}",
    }
    precision = choose_precision(config.precision.dtype, _device_type())
    facts["precision here"] = f"{precision.name} ({precision.reason})"
    fp8 = fp8_choice(config, _device_type(), precision)
    if fp8 is not None:
        facts["FP8 here"] = fp8.reason
    for name, value in facts.items():
        console.print(f"{name:28} {value}", highlight=False)
    console.print(_source_table(config, sampler, total_samples))
    if len(config.data.all_stages) > 1:
        console.print(_stage_table(config, sampler))
    console.print(_cache_table(config))
    if config.model.core == "ice":
        print_plan(_plan(config, world_size, precision), console)
    else:
        count = count_parameters(config.model, config.mean_loops)
        counts = f"total {count.total:,}, active a token {count.active:,}, executed {count.executed:,} over its loops"
        console.print(f"parameters: {counts}; memory and time are planned for model.core = ice only", highlight=False)
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


def _remat(config: TrainingConfig) -> str:
    loop = config.loop
    where = ", states in host memory" if loop.remat_offload else ""
    return f"loops: {loop.remat}{where}; prelude and coda: {once_policy(loop.remat, loop.remat_once)}"


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _open_sampler(config: TrainingConfig) -> Sampler:
    """The run's sampler, after the checks that training begins with."""
    from pretrain.data import check_vocabulary, open_main, open_sampler

    dataset = open_main(config.data)
    check_vocabulary(dataset, config.model.vocab_size)
    sampler = open_sampler(config.data, config.run.seed, config.model.vocab_size, dataset)
    sampler.require_enough(config.schedule.steps * config.data.global_batch_size)
    return sampler


def _source_table(config: TrainingConfig, sampler: Sampler | None, total_samples: int) -> Table:
    """What the run will see of each source; sizes and epochs where the data is here."""
    table = Table(title=f"sources, {config.data.packing}")
    table.add_column("source")
    for column in ("weight", "tokens", "epochs", "used up after"):
        table.add_column(column, justify="right")
    ends = dict(sampler.plan.used_up(total_samples)) if sampler is not None else {}
    for index, source in enumerate(config.data.all_sources):
        cells = [source.label, f"{source.weight:g}"]
        if sampler is None:
            cells += ["?", "?", "?"]
        else:
            epochs = sampler.plan.epochs_before(total_samples)[index]
            cap = "" if source.max_epochs is None else f" of {source.max_epochs}"
            end = ends.get(source.label)
            cells += [f"{sampler.sources[index].total_tokens:,}", f"{epochs:.2f}{cap}"]
            cells.append("" if end is None else f"{sampler.plan.tokens_before(end):,} tokens")
        table.add_row(*cells)
    return table


def _stage_table(config: TrainingConfig, sampler: Sampler | None) -> Table:
    """The curriculum; the step at which each stage begins where the data is here."""
    table = Table(title="stages")
    for column in ("from tokens", "from step", "sequence length", "mean loops"):
        table.add_column(column, justify="right")
    for source in config.data.all_sources:
        table.add_column(source.label, justify="right")
    steps: dict[int, int] = {}
    for segment in [] if sampler is None else sampler.plan.segments:
        steps.setdefault(segment.stage.from_tokens, segment.from_sample // config.data.global_batch_size)
    for stage in config.data.all_stages:
        table.add_row(
            f"{stage.from_tokens:,}",
            f"{steps[stage.from_tokens]:,}" if stage.from_tokens in steps else "?",
            f"{stage.sequence_length:,}",
            str(stage.mean_loops or config.mean_loops),
            *(f"{weight / sum(stage.weights):.1%}" for weight in stage.weights),
        )
    return table


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


def _plan(config: TrainingConfig, world_size: int, precision: PrecisionChoice) -> Plan:
    """What ``launch/plan.py`` says of the same run on its default GPU; "auto" will be bf16 there."""
    dtype = "bf16" if config.precision.dtype == "auto" else precision.name
    run = planned_run(config, world_size, dtype_bytes=4 if dtype == "fp32" else 2)
    return make_plan(run, GPUS[DEFAULT_GPU], search=False)
