"""What a run costs: the numbers in which two runs can be called equal.

    python launch/budget.py configs/baselines/flops.json

makes the members of a comparison equal (``launch/comparison.py``) and shows their budgets, or refuses the comparison
with one line and status 78. ``launch/sweep.py`` trains them.

Parameters and FLOPs are the plan's (``launch/planning``), which tests hold to the model and to torch's counter. The
FLOPs are those of the loops that the run really executes: depth is drawn from (seed, step), so they are known before it
starts. Recomputation is counted apart, since it buys memory and no learning.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.planning.flops import model_flops, total_flops, training_flops
from launch.planning.run import planned_run
from launch.planning.weights import active_parameters, model_weights
from launch.settings import EXIT_FINISHED, BadInputError, exit_with_status

if TYPE_CHECKING:
    from pretrain.config import TrainingConfig

KV_BYTES_PER_NUMBER = 2  # the decoding cache in 16 bits
_ONCE = ("prelude", "core fusion", "coda", "norms")  # parts that no loop runs again, the two tables apart


@dataclass(frozen=True)
class Budget:
    """Of a whole run. ``executed_loops`` is the mean over steps; ``kv_bytes`` of one sequence of training length."""

    parameters: int
    active_parameters: int
    non_embedding_parameters: int  # without the embedding table and the head
    once_parameters: int  # of those: in what a token passes once (prelude, coda, norms, fusion); no depth heads
    recurrent_parameters: int  # in the looped core, all its experts
    active_recurrent_parameters: int  # in the looped core, without the experts that a token is not sent to
    tokens: int
    executed_loops: float
    training_flops: float  # forward and backward of the executed loops
    recomputed_flops: float
    kv_bytes: int


def budget_of(config: TrainingConfig, source: str) -> Budget:
    """The budget of ``config``. ``BadInputError``, naming ``source``, for a curriculum: its steps differ in length."""
    from model.parameters import cache_bytes

    _refuse_stages(config, source)
    weights = model_weights(config.model)
    parts = weights.by_part()
    active = active_parameters(config.model)
    once = sum(parts.get(part, 0) for part in _ONCE)
    tables = parts["embedding"] + parts.get("head", 0)
    loops = Counter(itertools.islice(loops_of_steps(config), config.schedule.steps))
    flops_of, steps, step_tokens = _token_flops(config), config.schedule.steps, _step_tokens(config)
    trained = sum(count * flops_of(depth)[0] for depth, count in loops.items())
    recomputed = sum(count * flops_of(depth)[1] for depth, count in loops.items())
    cache = cache_bytes(config.model, config.mean_loops, KV_BYTES_PER_NUMBER)
    return Budget(
        parameters=weights.total,
        active_parameters=active,
        non_embedding_parameters=weights.total - tables,
        once_parameters=once,
        recurrent_parameters=weights.total - tables - once - parts.get("depth heads", 0),
        active_recurrent_parameters=active - tables - once,
        tokens=steps * step_tokens,
        executed_loops=sum(count * depth for depth, count in loops.items()) / steps,
        training_flops=trained * step_tokens,
        recomputed_flops=recomputed * step_tokens,
        kv_bytes=cache.constant + cache.per_token * config.data.sequence_length,
    )


def steps_for_flops(config: TrainingConfig, flops: float, source: str) -> int:
    """Steps after which the executed training FLOPs of ``config`` are nearest to ``flops``; at least 1."""
    _refuse_stages(config, source)
    flops_of, step_tokens, spent = _token_flops(config), _step_tokens(config), 0.0
    for step, depth in enumerate(loops_of_steps(config), start=1):
        before, spent = spent, spent + flops_of(depth)[0] * step_tokens
        if spent >= flops:
            return step if spent - flops <= flops - before or step == 1 else step - 1
    raise AssertionError("the steps of a run have no end")


def loops_of_steps(config: TrainingConfig) -> Iterator[int]:
    """Loops of step 1, 2, ..., without end; the same that training draws."""
    from pretrain.loop_depth import sample_loops

    return (sample_loops(config.loop, config.mean_loops, config.run.seed, step) for step in itertools.count(1))


def _token_flops(config: TrainingConfig) -> Callable[[int], tuple[float, float]]:
    """``flops_of(loops)``: training FLOPs and recomputed ones of a token in a step of so many loops."""
    run = planned_run(config, 1, KV_BYTES_PER_NUMBER)
    known: dict[int, tuple[float, float]] = {}

    def flops_of(loops: int) -> tuple[float, float]:
        if loops not in known:
            parts = training_flops(run, loops)
            known[loops] = (model_flops(parts), total_flops(parts).recompute)
        return known[loops]

    return flops_of


def _step_tokens(config: TrainingConfig) -> int:
    return config.data.global_batch_size * config.data.sequence_length


def _refuse_stages(config: TrainingConfig, source: str) -> None:
    if config.data.stages:
        raise BadInputError(
            f"{source}: data.stages: a budget is counted for runs without a curriculum; remove the stages"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    from rich.console import Console

    from launch.comparison import budget_table, load_comparison, solved_budgets

    parser = argparse.ArgumentParser(description="Make the members of a comparison equal, and show their budgets.")
    parser.add_argument("comparison", type=Path, metavar="FILE", help="such as configs/baselines/flops.json")
    options = parser.parse_args(arguments)
    comparison = load_comparison(options.comparison)
    members = solved_budgets(comparison, options.comparison)
    # A row is longer than a terminal that nobody has widened.
    width = None if sys.stdout.isatty() else 170
    Console(width=width, highlight=False).print(budget_table(comparison, members))
    return EXIT_FINISHED


if __name__ == "__main__":
    exit_with_status(main)
