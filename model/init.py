r"""Initial values, scaled for the loop, and which parameters weight decay may touch.

A matrix with ``fan_in`` inputs starts as N(0, 2 / (5 fan_in)) ("small init", Nguyen and Salazar 2019): an input of
unit variance leaves with 0.4. A matrix that writes into the residual stream is scaled further by
``1 / sqrt(2 L)`` with ``L = prelude + T * recurrent + coda`` the blocks a token really passes (a looped block is
counted once per loop, two writes a block), so that the stream's variance at the end does not depend on T.

Every module fills its own parameters inside its own ``__init__``: ``deepspeed.zero.Init`` partitions them the moment
that returns, and a parent would only see empty tensors.
"""

from __future__ import annotations

import math

import torch
from torch import nn

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
