"""The tape: what a recomputation is told instead of finding it out anew.

A checkpointed function runs twice. Some of what it finds out the first time is dear and small (which experts a token
goes to: a top-k and a sort; how many rows each rank sends: an exchange and a host synchronisation), some is dear and
large (what an all-to-all brought). Code that finds out such a thing says so,

    plan = keep("routes", lambda: plan_dispatch(routes))

and is otherwise plain: outside of a checkpoint, or under a policy that does not keep that kind, ``keep`` just calls.
Under one that does, the first run's answer goes on the tape, and a recomputation reads it back in the same order. The
answer is replayed, never the graph: what is kept must carry no gradient by itself (indices, counts, splits), or be the
value inside an ``autograd.Function`` whose backward stands on its own (an all-to-all's).

Each checkpointed call has a tape of its own, held by the graph and freed with it. Replaying may begin again at any time
(a second backward through a retained graph); an early stop leaves the rest unread. A checkpoint inside a checkpoint has
its own tape and writes on the outer one too, by which it is told when the outer one is recomputed.

One kind is kept whatever the policy: a layout, without which a recomputation could not make what the first run made,
since it was not the layer's to decide (in which order rows arrived).

Integers are kept in 32 bits: tokens, rows and experts on one rank are fewer than 2^31.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

Kind = Literal["routes", "dispatch", "layout"]
ALWAYS_KEPT: frozenset[Kind] = frozenset({"layout"})
Value = TypeVar("Value")


@dataclass(frozen=True)
class _Narrowed:
    """An int64 tensor in 32 bits."""

    tensor: torch.Tensor


class Tape:
    """Answers of one checkpointed call, in the order in which they were asked for."""

    def __init__(self, kinds: frozenset[Kind]) -> None:
        self.kinds = kinds | ALWAYS_KEPT
        self._records: list[Any] = []
        self._next = 0
        self._replaying = False
        self._outer: Tape | None = None

    def start(self, *, replaying: bool, outer: Tape | None) -> None:
        """From here on, :meth:`keep` records at the end, or reads from the beginning.

        Args:
            replaying: Which of the two.
            outer: The tape of the checkpoint around this one, which is told and asked too.
        """
        self._replaying, self._next, self._outer = replaying, 0, outer

    def keep(self, kind: Kind, compute: Callable[[], Value]) -> Value:
        """See :func:`keep`."""
        if self._replaying and kind in self.kinds:
            record: Value = tree_map(_read, self._records[self._next])
            self._next += 1
            return record
        value = compute() if self._outer is None else self._outer.keep(kind, compute)
        if kind in self.kinds:
            self._records.append(tree_map(_written, value))
        return value

    def tensors(self) -> list[torch.Tensor]:
        """The tensors it holds."""
        leaves = [leaf.tensor if isinstance(leaf, _Narrowed) else leaf for leaf in tree_leaves(self._records)]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _written(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return _Narrowed(leaf.int()) if leaf.dtype == torch.int64 else leaf.detach()


def _read(leaf: Any) -> Any:
    if isinstance(leaf, _Narrowed):
        return leaf.tensor.long()
    # A new tensor of the same memory: an autograd.Function that returns it gives it a history.
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


# Not a global: autograd may recompute on a thread of its own.
_current: ContextVar[Tape | None] = ContextVar("remat_tape", default=None)


def keep(kind: Kind, compute: Callable[[], Value]) -> Value:
    """``compute()``; in a recomputation whose policy keeps ``kind``, what it gave the first time.

    Args:
        kind: ``routes`` for routing decisions and what follows from them, ``dispatch`` for rows from other ranks,
            ``layout`` for how those lie where that is not decided here (kept under every policy).
        compute: Gives a tensor, or tuples of tensors and plain values.
    """
    tape = _current.get()
    return compute() if tape is None else tape.keep(kind, compute)


class Playing:
    """The context in which a tape is the current one; may be entered again after it was left."""

    def __init__(self, tape: Tape, *, replaying: bool) -> None:
        self.tape, self.replaying = tape, replaying
        self._tokens: list[Token[Tape | None]] = []

    def __enter__(self) -> None:
        # The second run of an inner checkpoint comes when the outer's is over.
        self.tape.start(replaying=self.replaying, outer=None if self.replaying else _current.get())
        self._tokens.append(_current.set(self.tape))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _current.reset(self._tokens.pop())
