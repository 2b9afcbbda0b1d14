r"""One buffer for the gradient of a weight that a loop uses T times.

    dW = sum_t G_t^T X_t

Autograd makes a new tensor for every term and adds it to the sum so far: for the stacked experts that is T times
(E, O, I) numbers written, read again and added, in memory fresh from the system. A :class:`GradientSum` is the sum
itself: each use multiplies into it (``addmm_``), and the weight receives it once, after its last use.

How autograd knows when that is: :attr:`GradientSum.token` is an empty tensor, made from the weight before the loop and
handed to each use. A use gives it no gradient, but the graph runs the token's own backward only after that of every
use, and there the sum is handed over. Nothing depends on how many uses there are, on their order, or on whether their
forward is computed again.

Measured on one core, 64 experts of 512 x 1024, 64 rows each: 31 GFLOP/s into a new tensor (and then the addition),
78 into the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "gradient_sum"  # of a parameter, while a pass that uses it several times runs its forward


class GradientSum:
    """The gradient of ``weight`` over all its uses in one pass."""

    def __init__(self, weight: Tensor) -> None:
        self._shape = weight.shape
        self._sum: Tensor | None = None
        self._backward = -1  # which backward began the sum, as autograd counts them
        self.token: Tensor = _HandOver.apply(weight, self)

    def add(self, multiply_into: Callable[[Tensor, bool], None], like: Tensor) -> None:
        """Call ``multiply_into(sum, fresh)``: it adds one term, or fills a ``fresh`` sum whose content is undefined."""
        # A sum begun by an earlier backward of the same graph, which asked for other gradients only, is void.
        current = torch._C._current_graph_task_id()
        fresh = self._sum is None or self._backward != current
        if self._sum is None:
            self._sum = like.new_empty(self._shape)
        self._backward = current
        multiply_into(self._sum, fresh)

    def take(self) -> Tensor | None:
        """The sum, which is then forgotten; None when this backward has added nothing."""
        total, self._sum = self._sum, None
        return total if self._backward == torch._C._current_graph_task_id() else None


class _HandOver(torch.autograd.Function):
    """Makes the token; its backward, which comes after that of every use, is the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient_sum: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient_sum = gradient_sum
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.gradient_sum.take(), None


def gradient_sum_of(weight: Tensor) -> GradientSum | None:
    """The sum that the pass now running has for ``weight``, if it has one."""
    found: GradientSum | None = getattr(weight, _ATTRIBUTE, None)
    return found


@contextmanager
def summed_gradients(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """In the forward inside, each use of these weights that knows of :func:`gradient_sum_of` shares one sum.

    A weight that is empty now is one that ZeRO-3 gathers for each use anew, and its gradient is taken at each use.
    """
    summed = [weight for weight in weights if torch.is_grad_enabled() and weight.requires_grad and weight.numel()]
    for weight in summed:
        setattr(weight, _ATTRIBUTE, GradientSum(weight))
    try:
        yield
    finally:
        for weight in summed:
            delattr(weight, _ATTRIBUTE)
