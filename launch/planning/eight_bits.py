r"""What an FP8 recipe changes: which products are faster, and what it costs to round their operands.

A converted matrix multiplies in eight bits forward, when its forward is computed again, and for its input's gradient;
its own gradient stays in the dtype. So of 6 I O operations a token 4 run at the rate of eight bits. Rounding reads the
dtype (b bytes) and writes one byte, of the rows and of the whole matrix, in each of these products:

    bytes = uses (b + 1) (R I + I O)         R rows; nothing hides them

Parameters, gradients and gathers stay as they are (``docs/precision.md``). Where a device has no kernels for the
recipe, or the run is in fp32, it is emulated: here as fast as without, in truth slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.flops import training_flops
from launch.planning.gpus import Gpu
from launch.planning.run import PlannedRun
from launch.planning.weights import Weight, model_weights


@dataclass(frozen=True)
class EightBits:
    """Of one token and mean depth by part; of one rank and step."""

    flops: dict[str, float]
    rounding_bytes: float


def emulated(run: PlannedRun, gpu: Gpu) -> bool:
    """Whether ``gpu`` only imitates the recipe of ``run``."""
    return run.recipe != "bf16" and (run.recipe not in gpu.fp8_recipes or run.dtype_bytes != 2)


def converted(run: PlannedRun, weight: Weight) -> bool:
    """Whether the recipe multiplies with ``weight`` in eight bits: ``model/fp8/conversion.py`` by name and shape."""
    from model.fp8.conversion import ALIGNMENT, parts_of  # brings torch along

    if run.recipe == "bf16" or len(weight.shape) < 2:
        return False
    if weight.expert:
        # Of a core, and called experts: the two names that leave them out.
        parts = frozenset({"experts", "core"})
        sizes = run.model.dim, run.model.expert_dim
    else:
        linear = weight.name.removesuffix(".weight")
        parts = frozenset() if weight.part == "core router" else parts_of(linear)
        sizes = weight.shape[0], weight.shape[1]
    return bool(parts) and not parts & set(run.fp8_exclude) and not any(size % ALIGNMENT for size in sizes)


def eight_bits(run: PlannedRun, gpu: Gpu) -> EightBits:
    """What of a mean step of ``run`` is multiplied and rounded in eight bits on ``gpu``."""
    if run.recipe == "bf16" or emulated(run, gpu):
        return EightBits({}, 0.0)
    chosen = {w.name: w for w in model_weights(run.model).weights() if converted(run, w)}
    plain = training_flops(run, run.mean_loops, only=lambda weight: False)
    own = training_flops(run, run.mean_loops, only=lambda weight: weight.name in chosen)
    flops, rounded = {}, 0.0
    for part, all_of_it in own.items():
        rest = plain[part]  # attention's squares, the head, the fusion's gate
        forward, backward = all_of_it.forward - rest.forward, all_of_it.backward - rest.backward
        flops[part] = forward + backward / 2 + all_of_it.recompute - rest.recompute
        rounded += flops[part] * _bytes_a_flop(run, [w for w in chosen.values() if _part(w) == part])
    return EightBits(flops, rounded)


def _part(weight: Weight) -> str:
    """The part of ``flops.py`` that a converted weight is in."""
    if weight.expert:
        return "core experts"
    return weight.part if weight.part in ("prelude", "coda") else "core matrices"


def _bytes_a_flop(run: PlannedRun, weights: list[Weight]) -> float:
    """Bytes that a rank rounds in a step for each operation a token, of products with ``weights`` in turn."""
    if not weights:
        return 0.0
    model, tokens = run.model, run.step_tokens / run.ranks
    share = model.n_experts_per_tok / model.n_experts if weights[0].expert else 1.0
    flops = sum(2 * weight.elements * share for weight in weights)
    # The engine multiplies an expert's gate and up one after the other, and rounds the rows for each.
    widths = sum(weight.shape[-1] * (2 if weight.expert and "gate_up" in weight.name else 1) for weight in weights)
    rows = tokens * (model.n_experts_per_tok if weights[0].expert else 1)
    matrices = sum(map(run.placement.local_elements, weights)) * run.grad_accum_steps
    return (run.dtype_bytes + 1) * (rows * widths + matrices) / flops


def copies_bytes(run: PlannedRun) -> float:
    """The largest matrix and its rows in eight bits, which are there while it multiplies; rows are never kept."""
    model, largest = run.model, 0.0
    if run.recipe == "bf16":
        return largest
    for weight in model_weights(model).weights():
        if converted(run, weight):
            halves = 2 if weight.expert and "gate_up" in weight.name else 1
            rows = run.micro_tokens * (model.n_experts_per_tok if weight.expert else 1)
            largest = max(largest, run.placement.local_elements(weight) / halves + rows * weight.shape[-1])
    return largest
