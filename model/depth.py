"""How deep one forward goes: the plan every core follows.

T is the same for every sequence of a forward and, in training, on every rank: a rank that ran another number of loops
would run another number of collectives. A sequence's or token's own depth only masks what changes inside the common T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch


class DepthController(Protocol):
    """Decides while decoding, token by token, whether another loop is run. Never used while training.

    ``loops_BS`` holds the loops each token of the current forward has been given so far.
    """

    loops_BS: torch.Tensor

    def start(self, e_BSD: torch.Tensor, n_loops: int) -> None:
        """A forward begins: the encoded input, and the most loops it may run."""

    def continues(self, loop: int, h_BSD: torch.Tensor) -> torch.Tensor:
        """Whether loop number ``loop`` (counted from 0, at least 1) is run, (B, S) bool.

        ``h_BSD`` is what the core shows of the loop before: its state, unless its ``shown`` says otherwise.
        """


class DecodingController(DepthController, Protocol):
    """A controller that is told which sequences have ended, so that they hold up no other."""

    ended_B: torch.Tensor | None


class FollowedDepths:
    """The controller of a coarser scale: ``ceil(d / scale)`` loops where the finest scale ran d."""

    def __init__(self, loops_BS: torch.Tensor, scale: int) -> None:
        self.loops_BS = (loops_BS + scale - 1).div(scale, rounding_mode="floor")

    def start(self, e_BSD: torch.Tensor, n_loops: int) -> None:
        """Nothing to prepare."""

    def continues(self, loop: int, h_BSD: torch.Tensor) -> torch.Tensor:
        """Whether the token's depth at this scale is beyond ``loop``."""
        return self.loops_BS > loop


@dataclass(frozen=True)
class DepthPlan:
    """The loops of one forward.

    Attributes:
        n_loops: T, at least 1.
        grad_loops: Loops at the end that keep a graph (truncated backpropagation); None: all.
        sequence_loops_B: Depth of each sequence, int64; values above T mean T. None: T for all.
        read_loops: Depths whose states are wanted too, each between 1 and T.
        controller: Ends tokens early; a token's state no longer changes once it has ended.
        noise_keys_B: What the random initial state of each sequence is made from, int64; None: drawn from torch's
            generator.
    """

    n_loops: int
    grad_loops: int | None = None
    sequence_loops_B: torch.Tensor | None = None
    read_loops: tuple[int, ...] = ()
    controller: DepthController | None = None
    noise_keys_B: torch.Tensor | None = None

    def at_scale(self, scale: int) -> DepthPlan:
        """The plan of the core of ``scale`` (MSRD): every depth d becomes ``max(1, ceil(d / scale))``."""

        def scaled(depth: int) -> int:
            return max(1, -(-depth // scale))

        own = self.sequence_loops_B
        return replace(
            self,
            n_loops=scaled(self.n_loops),
            grad_loops=None if self.grad_loops is None else scaled(self.grad_loops),
            sequence_loops_B=None if own is None else (own + scale - 1).div(scale, rounding_mode="floor").clamp_min(1),
            read_loops=tuple(scaled(depth) for depth in self.read_loops),
        )
