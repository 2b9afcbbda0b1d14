"""What is planned: a run's settings and a number of ranks, flattened to what the arithmetic asks for.

The one place where the plan reads a :class:`~pretrain.config.TrainingConfig`; everything else takes a
:class:`PlannedRun`, of which the search makes variations with ``dataclasses.replace``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from launch.planning.engine_settings import DEFAULTS, EngineSettings
from launch.planning.gathering import Placement

if TYPE_CHECKING:
    from model.config import IceConfig
    from model.fp8 import Fp8Part, RecipeName
    from pretrain.config import TrainingConfig

Remat = Literal["none", "loop", "routes", "dispatch", "sqrt"]


@dataclass(frozen=True)
class PlannedRun:
    """A run on ``ranks`` ranks. Depths: of the mean step for time and bytes, of the deepest one for memory."""

    name: str
    model: IceConfig
    ranks: int
    sequence_length: int
    global_batch_size: int  # sequences
    steps: int
    mean_loops: int
    max_loops: int
    grad_loops: int | None
    dtype_bytes: int  # weights and activations: 2 or 4
    zero_stage: int
    expert_parallel_size: int
    micro_batch_size: int
    remat: Remat = "loop"
    remat_once: bool = True  # prelude and coda blocks are recomputed
    remat_offload: bool = False
    fp8_dispatch: bool = False  # rows travel to their experts in eight bits, and back in the dtype
    zero_init: bool = False
    muon: bool = False  # updates the hidden matrices; AdamW the rest
    recipe: RecipeName = "bf16"  # what matrix products are made in
    fp8_exclude: tuple[Fp8Part, ...] = ()
    offload_optimizer: bool = False
    offload_parameters: bool = False
    extra_reads: int = 0  # CDL reads the model at one more depth
    probes: int = 0  # SLU reads it at two more, without gradients
    loss_chunk_tokens: int | None = None  # tokens whose logits exist at once; None: all, kept for the backward
    engine: EngineSettings = DEFAULTS

    @property
    def placement(self) -> Placement:
        """Who shares which weight."""
        return Placement(self.ranks, self.expert_parallel_size)

    @property
    def micro_tokens(self) -> int:
        """Tokens a rank runs at once."""
        return self.micro_batch_size * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, over all ranks."""
        return self.global_batch_size * self.sequence_length

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.ranks)

    def recomputed_loops(self, kept: int) -> int:
        """Loops that a backward through ``kept`` loops runs again.

        ``sqrt`` runs each again, and before that each segment but the last up to its last loop's start.
        """
        if self.remat == "none":
            return 0
        return kept + (self._outer_segments(kept) * (self._segment(kept) - 1) if self.remat == "sqrt" else 0)

    def kept_states(self, kept: int) -> int:
        """Loop states alive at once: all, or with ``sqrt`` one a segment and those of the segment at hand."""
        return self._outer_segments(kept) + self._segment(kept) if self.remat == "sqrt" else kept

    @staticmethod
    def _segment(kept: int) -> int:
        return math.isqrt(max(kept, 1) - 1) + 1

    def _outer_segments(self, kept: int) -> int:
        return -(-kept // self._segment(kept)) - 1

    def loops_of_scales(self, loops: int) -> list[tuple[int, int]]:
        """(loops, loops with a gradient) of each MSRD scale's core when the model runs ``loops``."""
        depths = []
        for scale in self.model.msrd_scales:
            own = max(1, -(-loops // scale))
            kept = own if self.grad_loops is None else min(own, max(1, -(-self.grad_loops // scale)))
            depths.append((own, kept))
        return depths


def planned_run(config: TrainingConfig, ranks: int, dtype_bytes: int) -> PlannedRun:
    """``config`` on ``ranks`` ranks, in a dtype of ``dtype_bytes``."""
    loop, parallel = config.loop, config.parallel
    fixed = loop.distribution == "fixed" or config.mean_loops == 1
    return PlannedRun(
        name=config.run.name,
        model=config.model,
        ranks=ranks,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.data.global_batch_size,
        steps=config.schedule.steps,
        mean_loops=config.mean_loops,
        max_loops=config.mean_loops if fixed else loop.max_loops or 2 * config.mean_loops,
        grad_loops=loop.grad_loops,
        dtype_bytes=dtype_bytes,
        zero_stage=parallel.zero_stage,
        expert_parallel_size=parallel.expert_parallel_size,
        micro_batch_size=parallel.micro_batch_size,
        loss_chunk_tokens=parallel.loss_chunk_tokens,
        remat=loop.remat,
        remat_once=(loop.remat_once or loop.remat) != "none",
        remat_offload=loop.remat_offload,
        fp8_dispatch=parallel.fp8_dispatch,
        zero_init=parallel.zero_init,
        muon=config.optim.kind == "muon",
        engine=EngineSettings(reduce_bucket_size=parallel.reduce_bucket_size, sub_group_size=parallel.sub_group_size),
        recipe=config.precision.recipe,
        fp8_exclude=config.precision.fp8_exclude,
        offload_optimizer=parallel.offload_optimizer != "none",
        offload_parameters=parallel.offload_parameters != "none",
        extra_reads=1 if loop.cdl is not None else 0,
        probes=2 if config.model.slu else 0,
    )
