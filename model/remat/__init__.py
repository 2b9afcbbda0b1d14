"""Rematerialisation: what a looped model keeps for its backward pass, and what it computes again.

Here are the policies by name. How they work: ``checkpointing.py`` (a loop, or a segment of loops, computed again),
``tape.py`` (what a recomputation is told instead of finding it out anew), ``host.py`` (loop states in host memory).
Bytes and prices: docs/remat.md.

Loops (``loop.remat``), for T loops that carry a gradient, S0 = batch x sequence x width numbers a state:

    none      everything every loop computes                                                  T x (tens of states)
    loop      the state each loop starts from                                                 T
    routes    and which experts each token went to, where its rows lie, and how many rows     T (1 + a few integers
              go to which rank: routing is decided once                                            a choice)
    dispatch  and what each all-to-all brought: a recomputation communicates nothing;         T (1 + 2 x top_k)
              the same as routes where experts are not spread over ranks
    sqrt      the state each segment of ceil(sqrt(T)) loops starts from, and, one segment     2 sqrt(T)
              at a time, those inside it; two recomputations instead of one

Any of them may offload its states to host memory (``loop.remat_offload``). Prelude and coda run once and have their own
choice (``loop.remat_once``): ``none``, or ``block``, the input of each block.

All policies give the same bits. Every routing decision is counted once.
"""

from __future__ import annotations

from typing import Literal, get_args

from model.remat.checkpointing import checkpointed, compact, segments
from model.remat.host import HostCopies
from model.remat.tape import Kind, keep

RematPolicy = Literal["none", "loop", "routes", "dispatch", "sqrt"]
RematOnce = Literal["none", "block"]

KINDS: dict[RematPolicy, frozenset[Kind]] = {
    "none": frozenset(),
    "loop": frozenset(),
    "routes": frozenset({"routes"}),
    "dispatch": frozenset({"routes", "dispatch"}),
    "sqrt": frozenset(),
}
"""What a loop's recomputation is told, by policy."""


def check_policy(policy: str, once: str | None = None, offload: bool = False) -> None:
    """Raise ``ValueError`` when ``policy`` is no ``RematPolicy``, ``once`` no ``RematOnce``, or nothing to offload."""
    choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("remat", policy, get_args(RematPolicy)),
        ("remat_once", once or "none", get_args(RematOnce)),
    )
    for name, value, accepted in choices:
        if value not in accepted:
            raise ValueError(f"{name} = {value}: must be one of {', '.join(accepted)}")
    if offload and policy == "none":
        raise ValueError("remat_offload = true: remat = none keeps no loop states to offload; choose another policy")


def once_policy(policy: RematPolicy, once: RematOnce | None) -> RematOnce:
    """What prelude and coda do where ``once`` leaves it open: as the loops, keep everything or recompute."""
    if once is not None:
        return once
    return "none" if policy == "none" else "block"


__all__ = [
    "KINDS",
    "HostCopies",
    "Kind",
    "RematOnce",
    "RematPolicy",
    "check_policy",
    "checkpointed",
    "compact",
    "keep",
    "once_policy",
    "segments",
]
