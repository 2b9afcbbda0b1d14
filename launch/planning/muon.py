r"""What Muon asks of a step, beside AdamW: momentum, Newton-Schulz, and gathers of gradients and momenta.

DeepSpeed takes the hidden matrices of a sub-group in chunks of at most ``reduce_bucket_size`` numbers (one matrix at
least), gathers a chunk's gradients and momenta whole on every rank, and lets the ranks that share them orthogonalise
one matrix each, in rounds of as many matrices as there are ranks (``_muon_update_sub_group`` in
``deepspeed/runtime/zero/stage3.py``). A round lasts as long as its largest matrix, and then hands every rank's result
to all: twice (ranks x the largest matrix), which is what a large cluster has no memory for. Matrices come sorted by
shape, the largest first, or in the model's order where ``zero.Init`` has hidden their shapes from the optimizer.

A rank's experts of a layer are three stacks (gate, up, down), and a stack is one matrix here: one rank of those that
share it orthogonalises all its experts. Newton-Schulz on an n x m matrix, n < m, in its gram form: 8 n^2 m + 28 n^3
operations; 30 n^3 on a square one.

State: the momentum, in the dtype of the run, where AdamW has two moments in fp32; the fp32 master stays.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from launch.planning.gathering import Placement
from launch.planning.run import PlannedRun
from launch.planning.weights import Weight, model_weights
from model.config import IceConfig

_HIDDEN_MATRIX = re.compile(r"\b(attention|ffn)\.(?!router\.|gate\.)")


@dataclass(frozen=True)
class Stack:
    """What a rank orthogonalises at once: ``count`` matrices of ``rows`` x ``columns``."""

    count: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Numbers in all of them."""
        return self.count * self.rows * self.columns

    @property
    def flops(self) -> float:
        """Of Newton-Schulz on all of them."""
        return self.count * newton_schulz_flops(self.rows, self.columns)


@dataclass(frozen=True)
class Chunk:
    """Stacks that are gathered together, and the ``owners`` over which they are sharded."""

    owners: int
    stacks: tuple[Stack, ...]

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return sum(stack.elements for stack in self.stacks)

    @property
    def gathered(self) -> int:
        """Numbers of one gather of it, padded to equal shards."""
        return sum(-(-stack.elements // self.owners) * self.owners for stack in self.stacks)

    def rounds(self) -> Iterator[tuple[Stack, ...]]:
        """Stacks that are orthogonalised at the same time, by a rank each."""
        for first in range(0, len(self.stacks), self.owners):
            yield self.stacks[first : first + self.owners]


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Five steps of DeepSpeed's ``zeropower_via_gram_newtonschulz`` on one matrix."""
    n, m = sorted((rows, columns))
    return 30.0 * n**3 if n == m else 8.0 * n * n * m + 28.0 * n**3


def hidden(weight: Weight) -> bool:
    """Whether Muon updates ``weight``; ``pretrain.muon.is_muons`` by name and shape."""
    return len(weight.shape) >= 2 and _HIDDEN_MATRIX.search(weight.name) is not None


@functools.lru_cache(maxsize=1024)
def chunks(config: IceConfig, placement: Placement, bucket: int, by_shape: bool) -> tuple[Chunk, ...]:
    """The chunks of a step, shared matrices and experts apart, as no process group holds both."""
    found: list[Chunk] = []
    everything = [weight for weight in model_weights(config).weights() if hidden(weight)]
    for expert in (False, True):
        stacks = [stack for weight in everything if weight.expert == expert for stack in _stacks(weight, placement)]
        if by_shape:
            stacks.sort(key=lambda stack: (stack.count, stack.rows, stack.columns), reverse=True)
        owners = placement.ranks // (placement.expert_parallel_size if expert else 1)
        pending: list[Stack] = []
        for stack in stacks:
            if pending and sum(s.elements for s in pending) + stack.elements > bucket:
                found.append(Chunk(owners, tuple(pending)))
                pending = []
            pending.append(stack)
        if pending:
            found.append(Chunk(owners, tuple(pending)))
    return tuple(found)


def _stacks(weight: Weight, placement: Placement) -> Iterator[Stack]:
    """A weight as the engine keeps it."""
    if not weight.expert:
        yield Stack(1, *weight.shape)
        return
    experts, rows, columns = weight.shape
    parts = 2 if weight.name.endswith("gate_up_proj") else 1
    for _ in range(parts):
        yield Stack(experts // placement.expert_parallel_size, rows // parts, columns)


def chunks_of(run: PlannedRun) -> tuple[Chunk, ...]:
    """Those of ``run``; none without Muon."""
    if not run.muon:
        return ()
    return chunks(run.model, run.placement, run.engine.reduce_bucket_size, by_shape=not run.zero_init)


def shard_elements(run: PlannedRun) -> int:
    """Numbers whose update is Muon's, of one rank."""
    return sum(chunk.gathered // chunk.owners for chunk in chunks_of(run))


def flops_in_turn(run: PlannedRun) -> float:
    """Operations that a step waits for: of each round its dearest stack's."""
    return math.fsum(max(stack.flops for stack in rounds) for chunk in chunks_of(run) for rounds in chunk.rounds())


def gathered_elements(run: PlannedRun) -> dict[int, int]:
    """Numbers of all gathers of a step, by how many ranks take part; a lone one only hands out to itself."""
    totals: dict[int, int] = {}
    for chunk in chunks_of(run):
        handed = sum(chunk.owners * max(stack.elements for stack in rounds) for rounds in chunk.rounds())
        gathered = chunk.gathered if chunk.owners > 1 else 0
        totals[chunk.owners] = totals.get(chunk.owners, 0) + 2 * gathered + 2 * handed
    return totals


def passing_bytes(run: PlannedRun) -> float:
    """The most that comes and goes in Muon's step of a rank.

    Gradients and momenta of a chunk, whole; and with them either one more such buffer, while the second of them is put
    in order, or what a round hands out, or the iteration's own matrices (two as large as the stack, four square).
    """
    most = 0.0
    for chunk in chunks_of(run):
        held = 2 * chunk.gathered
        largest = max(stack.elements for stack in chunk.stacks)
        handed = 2 * largest * (chunk.owners + (chunk.owners > 1))
        iterating = max(2 * s.elements + 4 * s.count * min(s.rows, s.columns) ** 2 for s in chunk.stacks)
        most = max(most, held + max(chunk.gathered, handed, iterating))
    return run.dtype_bytes * most
