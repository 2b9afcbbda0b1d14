r"""Initial values, scaled for the loop, and which parameters weight decay may touch.

A matrix with ``fan_in`` inputs starts as N(0, 2 / (5 fan_in)) ("small init", Nguyen and Salazar 2019): an input of
unit variance leaves with 0.4. A matrix that writes into the residual stream is scaled further by
``1 / sqrt(2 L)`` with ``L = prelude + T * recurrent + coda`` the blocks a token really passes (a looped block is
counted once per loop, two writes a block), so that the stream's variance at the end does not depend on T.

Every module fills its own parameters inside its own ``__init__``: ``deepspeed.zero.Init`` partitions them the moment
that returns, and a parent would only see empty tensors.

Routed experts are most of a model, and a rank has a few of them. Each of their matrices is therefore drawn from a
generator of its own, :class:`ExpertDraws`: whoever holds an expert can draw it, alone, and gets the same bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import IceConfig


def matrix_std(fan_in: int) -> float:
    """Standard deviation of a matrix with ``fan_in`` inputs."""
    return math.sqrt(0.4 / fan_in)


def output_std(config: IceConfig, fan_in: int) -> float:
    """Standard deviation of a matrix that writes into the residual stream."""
    return matrix_std(fan_in) / math.sqrt(2 * config.effective_depth)


def head_std(config: IceConfig) -> float:
    """Standard deviation of the untied head: logits of std 0.16, so the first loss is ln(vocab_size) to 0.02."""
    return matrix_std(config.dim) / 4


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: matrices yes; norms, biases, injection, loop gains and embeddings no.

    Args:
        name: The parameter's name in ``model.named_parameters()``.
        parameter: The parameter; under ZeRO-3 its shape before partitioning is read from ``ds_shape``.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and "embed" not in name.split(".")


class Linear(nn.Linear):
    """``nn.Linear`` without bias that starts as N(0, init_std^2)."""

    def __init__(self, in_features: int, out_features: int, *, init_std: float | None = None) -> None:
        # Set before nn.Linear's __init__ because that calls reset_parameters.
        self.init_std = matrix_std(in_features) if init_std is None else init_std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Fill the weight, (out_features, in_features)."""
        nn.init.normal_(self.weight, std=self.init_std)


@dataclass(frozen=True)
class ExpertDraws:
    """The initial weights of a layer's routed experts, of which anyone may draw any part.

    Each matrix (gate, up, down) of each expert comes from a generator seeded by the layer's seed, the expert's number
    among all experts and the matrix, in fp32, and is rounded to the dtype it is kept in. What a rank draws therefore
    depends neither on which other experts it holds nor on how many ranks there are. CPU and GPU generators differ.
    """

    seed: Tensor  # of the layer, int64 on the CPU
    hidden_std: float  # of gate and up
    output_std: float  # of down

    @staticmethod
    def of_next_layer(config: IceConfig) -> ExpertDraws:
        """Those of a layer being built: one number from torch's generator, which stays where it is on ``meta``."""
        return ExpertDraws(torch.randint(2**62, ()), matrix_std(config.dim), output_std(config, config.expert_dim))

    @torch.no_grad()
    def fill(self, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, first_expert: int = 0) -> None:
        """Fill the matrices of the experts from ``first_expert`` on; needs memory for one more matrix in fp32."""
        seed = int(self.seed)
        generator = torch.Generator(gate_EFD.device)
        stacks = ((gate_EFD, self.hidden_std), (up_EFD, self.hidden_std), (down_EDF, self.output_std))
        for matrix, (stack, std) in enumerate(stacks):
            drawn = torch.empty(stack.shape[1:], dtype=torch.float32, device=stack.device)
            for expert, weight in enumerate(stack, start=first_expert):
                generator.manual_seed(seed + len(stacks) * expert + matrix)
                weight.copy_(drawn.normal_(std=std, generator=generator))


_shapes_only: ContextVar[bool] = ContextVar("experts_are_shapes_only", default=False)


@contextlib.contextmanager
def experts_without_memory() -> Iterator[None]:
    """Models built inside have routed experts that are shapes (on ``meta``), for someone who keeps a few of them."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def expert_device() -> str | None:
    """Where a layer being built puts its routed experts: ``meta`` inside :func:`experts_without_memory`."""
    return "meta" if _shapes_only.get() else None
