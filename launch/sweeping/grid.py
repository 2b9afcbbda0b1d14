"""The cells of a sweep: every point of its grid as a whole configuration with its budget.

A cell's name is made of its own coordinates alone, such as ``c3e12-d64-r4-s0`` (3e12 FLOPs, size d64, 4 mean loops,
seed 0) or ``t2M-d64-r4-s0`` (2 million tokens), so it stays when the grid grows.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.budget import Budget, budget_of, steps_for_flops
from launch.comparison import check_equal, load_comparison, solve
from launch.settings import BadInputError, apply_overrides, as_overrides, parse_settings, read_json_object
from launch.sweeping.settings import SweepSettings

if TYPE_CHECKING:
    from pretrain.config import TrainingConfig

_MANY_STEPS = 2**31 - 1  # until FLOPs have said how many


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. ``flops_level`` is the isoFLOP level it belongs to, if any."""

    name: str
    size: str
    seed: int
    flops_level: float | None
    config: TrainingConfig
    budget: Budget

    @property
    def mean_loops(self) -> int:
        """Mean depth of its steps, as configured."""
        return self.config.mean_loops

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.schedule.steps


def expand_grid(sweep: SweepSettings, source: Path) -> list[Cell]:
    """Every cell of ``sweep``, read from ``source``, in the grid's order: budgets, then sizes, depths, seeds.

    Raises ``BadInputError`` when a cell's configuration is none, cannot run on ``ranks`` ranks, or whole steps miss its
    tokens or FLOPs by more than the tolerance.
    """
    comparison = None
    if sweep.comparison is not None:
        comparison = load_comparison(Path(sweep.comparison))
        sizes = solve(comparison, Path(sweep.comparison))
        sweep = sweep.model_copy(update={"config": comparison.config, "set": comparison.set, "sizes": sizes})
    base = read_json_object(Path(sweep.config))
    apply_overrides(base, as_overrides(sweep.set))
    amounts: list[tuple[int | None, float | None]] = (
        [(tokens, None) for tokens in sweep.tokens] or [(None, flops) for flops in sweep.flops] or [(None, None)]
    )
    axes = itertools.product(amounts, sweep.sizes, sweep.mean_loops or (None,), sweep.seeds)
    cells = [
        _make_cell(sweep, source, base, size, tokens, flops, loops, seed) for (tokens, flops), size, loops, seed in axes
    ]
    if comparison is not None:
        for seed in sweep.seeds:  # it draws other depths
            check_equal(comparison, {cell.size: cell.budget for cell in cells if cell.seed == seed}, source)
    return cells


def _make_cell(
    sweep: SweepSettings,
    source: Path,
    base: dict[str, Any],
    size: str,
    tokens: int | None,
    flops: float | None,
    loops: int | None,
    seed: int,
) -> Cell:
    from pretrain.config import TrainingConfig, check_topology

    name = _cell_name(size, tokens, flops, loops, seed)
    place = f"{source}: cell {name}"
    values = copy.deepcopy(base)
    apply_overrides(values, as_overrides(sweep.sizes[size]))
    own: dict[str, Any] = {"run.name": name, "run.dir": str(sweep.path), "run.seed": seed}
    own["logging.wandb_group"] = sweep.name
    if loops is not None:
        own |= {"loop.mean_loops": loops, "loop.max_loops": None, "model.max_loop_iters": loops}
    apply_overrides(values, as_overrides(own))

    def resolve(steps: int | None) -> TrainingConfig:
        changes: dict[str, Any] = {}
        if steps is not None:
            changes["schedule.steps"] = steps
            if sweep.warmup_fraction is not None:
                changes["schedule.warmup_steps"] = int(sweep.warmup_fraction * steps)
        chosen = copy.deepcopy(values)
        apply_overrides(chosen, as_overrides(changes))
        return parse_settings(TrainingConfig, chosen, place)

    if tokens is None and flops is None:
        config = resolve(None)
        if sweep.warmup_fraction is not None:
            config = resolve(config.schedule.steps)
    else:
        open_ended = resolve(_MANY_STEPS)
        step_tokens = open_ended.data.global_batch_size * open_ended.data.sequence_length
        if flops is not None:
            steps = steps_for_flops(open_ended, flops, place)
        else:
            assert tokens is not None
            steps = max(1, round(tokens / step_tokens))
        config = resolve(steps)
    check_topology(config, sweep.ranks, place)
    budget = budget_of(config, place)
    for key, wanted, got in (("tokens", tokens, budget.tokens), ("flops", flops, budget.training_flops)):
        if wanted is not None and abs(got - wanted) > sweep.tolerance * wanted:
            raise BadInputError(
                f"{place}: {key} = {wanted:g}: {config.schedule.steps} steps of a whole batch make {got:g}, off by "
                f"more than tolerance = {sweep.tolerance:g}; ask for more, or lower data.global_batch_size"
            )
    annotations = {"sweep": sweep.name, "size": size, **asdict(budget)}
    if flops is not None:
        annotations["flops_level"] = flops
    logging = config.logging.model_copy(update={"annotations": annotations})
    return Cell(name, size, seed, flops, config.model_copy(update={"logging": logging}), budget)


def _cell_name(size: str, tokens: int | None, flops: float | None, loops: int | None, seed: int) -> str:
    parts = []
    if flops is not None:
        parts.append("c" + _scientific(flops))
    if tokens is not None:
        parts.append("t" + _count(tokens))
    parts.append(size)
    if loops is not None:
        parts.append(f"r{loops}")
    return "-".join([*parts, f"s{seed}"])


def _count(number: int) -> str:
    """``number`` without loss, shorter where that is possible: 2000000 is 2M, 1024000 is 1.024M, 12345 is 12.345k."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit and number % (unit // 1000) == 0:
            return f"{number / unit:.12g}{letter}"
    return str(number)


def _scientific(number: float) -> str:
    """``number`` without loss: 3e12, 2.5e15."""
    digits, exponent = f"{number:.11e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
