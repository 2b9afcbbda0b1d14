r"""Grouped matrix products: one matrix an expert, each applied to that expert's run of rows.

    out[r] = W_i rows[r]   for r in offsets[i-1] : offsets[i]

The rows of all experts lie one expert after the other, so that the whole layer is ONE call. Who does it, and how, is a
:class:`GroupedProduct`; the experts hold one as their attribute ``product`` and know nothing else of it:

    grouped_mm   ``torch._grouped_mm``: a grouped kernel on GPUs, a loop in C++ on CPUs
    loop         one ordinary product an expert, in Python: what the others are measured against

Rows past the last offset exist where group sizes are padded: what is written there is unspecified, and nothing flows
back.

Shapes: R rows sorted by expert, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class GroupedProduct(Protocol):
    """Applies each expert's matrix to its rows."""

    row_alignment: int
    """Group sizes must be multiples of it, beyond what the device asks for (``model.moe.row_alignment``)."""

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """The products, (R, O).

        Args:
            rows_RI: Expert i owns rows ``offsets[i - 1] : offsets[i]``.
            weight_EOI: One matrix an expert, laid out as ``nn.Linear`` does.
            offsets_E: int32, the end of each expert's rows, on the device of the rows.
        """


class GroupedMM:
    """``torch._grouped_mm``; differentiable, no host synchronisation on GPUs."""

    row_alignment = 1

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`GroupedProduct`."""
        return torch._grouped_mm(rows_RI, weight_EOI.transpose(-2, -1), offs=offsets_E)


class ExpertLoop:
    """One product an expert. Reads the offsets on the host."""

    row_alignment = 1

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`GroupedProduct`; rows past the last offset come out as zeros."""
        ends = offsets_E.tolist()
        starts = [0, *ends[:-1]]
        outputs = [
            rows_RI[start:end] @ weight_EOI[i].T for i, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        outputs.append(rows_RI.new_zeros(rows_RI.shape[0] - ends[-1], weight_EOI.shape[1]))
        return torch.cat(outputs)


grouped_mm = GroupedMM()
loop = ExpertLoop()
