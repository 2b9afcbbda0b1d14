"""A function whose inside is computed again in the backward pass.

Only torch's non-reentrant checkpointing is used: the reentrant kind gives wrong gradients, silently, for a module that
runs several times under ZeRO-3. It keeps the tensors among the arguments and nothing else; what the function saves for
its backward is dropped and made anew, the gradients flow through the original graph. Nothing inside draws random
numbers, so no generator state is kept.

Checkpoints nest: a segment of loops that is recomputed runs checkpointed loops, whose arguments then, and only then,
take memory. That is the ``sqrt`` policy (Chen et al. 2016, arXiv:1604.06174, section 4.1): with segments of
ceil(sqrt(T)) loops, sqrt(T) segment starts and sqrt(T) loop starts of the segment at hand. The last segment is not
wrapped: its loop starts are the first thing the backward asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from model.expert_load import ExpertLoad
from model.remat.host import HostCopies
from model.remat.tape import Kind, Playing, Tape

Output = TypeVar("Output")


def checkpointed(
    function: Callable[..., Output],
    *args: Any,
    kinds: frozenset[Kind] = frozenset(),
    load: ExpertLoad | None = None,
    host: HostCopies | None = None,
) -> Output:
    """``function(*args)``, computed again in the backward; without gradients enabled, just called.

    Args:
        function: Gives the same for the same arguments, whatever has happened in between.
        args: Tensors, tuples and NamedTuples of tensors, and plain values.
        kinds: What the recomputation is told (``tape.py``).
        load: The counter of routed tokens; told to ignore the second run.
        host: Where the tensors among ``args`` are kept meanwhile; None: where they are.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # A tensor inside a tuple would be kept alive by reference, whatever an outer checkpoint or ``host`` wants.
    leaves, structure = tree_flatten(args)

    def unflattened(*leaves: Any) -> Output:
        return function(*tree_unflatten(leaves, structure))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        tape = Tape(kinds)
        counted_once = nullcontext if load is None else load.recomputing
        return Playing(tape, replaying=False), _Recomputation(Playing(tape, replaying=True), counted_once)

    with nullcontext() if host is None else host.keeping():
        output: Output = checkpoint(
            unflattened, *leaves, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    return output


def compact(values: Output) -> Output:
    """``values``, tuples of tensors, with every tensor that is a part of a larger memory in memory of its own.

    A key that is a slice of a fused projection would keep the whole projection alive in each loop that carries it.
    """

    def own_memory(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.untyped_storage().nbytes() <= leaf.nbytes:
            return leaf
        return leaf.clone(memory_format=torch.contiguous_format)

    compacted: Output = tree_map(own_memory, values)
    return compacted


def segments(loops: range, nested: bool) -> list[range]:
    """``loops`` in runs of ceil(sqrt(T)), the last one shorter; in one run when not ``nested``."""
    if not nested or not loops:
        return [loops]
    size = math.isqrt(len(loops) - 1) + 1
    return [loops[start : start + size] for start in range(0, len(loops), size)]


class _Recomputation:
    """The context of a second run; a backward through a retained graph enters it again."""

    def __init__(self, replay: Playing, counted_once: Callable[[], AbstractContextManager[None]]) -> None:
        self._replay, self._counted_once = replay, counted_once
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._replay)
            stack.enter_context(self._counted_once())
            self._open.append(stack.pop_all())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, traceback)
