"""Which matrices of a model are multiplied in FP8, and the exchange that makes them so.

Converted are the projections of attention, dense and shared feed-forwards (:class:`~model.init.Linear` becomes
:class:`Fp8Linear` where it stands) and the routed experts (their ``product``). Always in high precision stay router,
head, embeddings, norms, ``log_A`` and its like, adapters, gates and depth heads: small, or decisive, or both.

The exchange changes what is computed, never what is stored: the same parameters under the same names in the same dtype.
So a checkpoint of any recipe continues in any other, hooks stay where they are, and ``parallel`` may have sharded,
spread or replaced the modules before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

from torch import Tensor, nn

from model.config import IceConfig
from model.expert_parallel import set_expert_product
from model.fp8.products import DenseProduct, Fp8GroupedProduct, Kernels
from model.init import Linear

Fp8Part = Literal["prelude", "core", "coda", "attention", "feed_forward", "shared_experts", "experts"]
ALIGNMENT = 16  # both dimensions of a matrix must be multiples: 16 bytes are what the kernels load at once

_BLOCK = re.compile(r"(prelude|core|coda)\.(?:\w+\.)*?(attention\.(?!gate$)|ffn\.shared_experts\.|ffn\.)")
_KINDS: dict[str, Fp8Part] = {
    "attention.": "attention",
    "ffn.shared_experts.": "shared_experts",
    "ffn.": "feed_forward",
}


class Fp8Linear(Linear):
    """A :class:`~model.init.Linear` that multiplies in FP8; made by changing the class of one."""

    multiply: DenseProduct

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.multiply(input, self.weight)


class Fp8Conversion(NamedTuple):
    """What is multiplied in FP8 now, by the modules' names."""

    linears: tuple[str, ...]
    experts: Fp8GroupedProduct | None  # what multiplies the routed experts, if FP8 does
    unaligned: tuple[str, ...]  # left alone for their size

    def __str__(self) -> str:
        """For the log."""
        parts = [f"{len(self.linears)} linear layers"]
        parts += [] if self.experts is None else ["the routed experts"]
        line = f"FP8 multiplies in {' and '.join(parts)}"
        if self.unaligned:
            line += f"; not a multiple of {ALIGNMENT} in size, so not in {', '.join(self.unaligned)}"
        return line


def convert(model: nn.Module, config: IceConfig, kernels: Kernels, exclude: Collection[Fp8Part]) -> Fp8Conversion:
    """Let ``model``, plain or in the engine, multiply by ``kernels`` in all parts but those of ``exclude``."""
    multiply = DenseProduct(kernels)
    linears, unaligned = [], []
    for name, linear in _candidates(model, exclude):
        if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
            unaligned.append(name)
            continue
        linear.__class__ = Fp8Linear
        linear.multiply = multiply  # type: ignore[assignment]
        linears.append(name)
    experts = None
    if config.n_experts and not {"experts", "core"} & set(exclude):
        if config.dim % ALIGNMENT or config.expert_dim % ALIGNMENT:
            unaligned.append("the routed experts")
        else:
            experts = Fp8GroupedProduct(kernels)
            set_expert_product(model, experts)
    return Fp8Conversion(tuple(linears), experts, tuple(unaligned))


def parts_of(name: str) -> frozenset[Fp8Part]:
    """The parts that the linear layer called ``name`` belongs to; none if it always stays in high precision."""
    match = _BLOCK.match(name)
    if match is None:
        return frozenset()
    place: Fp8Part = match[1]  # type: ignore[assignment]
    return frozenset({place, _KINDS[match[2]]})


def _candidates(model: nn.Module, exclude: Collection[Fp8Part]) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            parts = parts_of(name)
            if parts and not parts & set(exclude):
                yield name, module
