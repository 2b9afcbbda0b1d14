"""Who attends: what ``parallel.attention`` means on this machine.

Plain causality is ``scaled_dot_product_attention``'s, and on CUDA its flash kernel's, whatever this says. The choice is
about layers with a window and about packed documents: SDPA is given the mask written out, ``flex_attention`` computes
only what is seen (``model/attention/flex.py``). Before a run trusts it, it is compiled and compared with SDPA, forward
and backward, on every rank, in the run's dtype and head widths; one rank's no is everybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from launch.settings import BadInputError
from model.attention.flex import AttentionKernel, probe
from pretrain.config import TrainingConfig


class AttentionChoice(NamedTuple):
    """The kernel where keys are hidden, and one line that says what runs."""

    kernel: AttentionKernel
    reason: str


def choose_attention(
    config: TrainingConfig,
    device: torch.device,
    dtype: torch.dtype,
    sum_over_ranks: Callable[[list[float]], list[float]],
) -> AttentionChoice:
    """The choice for a run; collective where there is something to choose.

    Raises:
        BadInputError: ``flex`` was asked for and cannot be had.
    """
    asked = config.parallel.attention
    hidden = _what_hides_keys(config)
    if hidden is None:
        return AttentionChoice("sdpa", "scaled_dot_product_attention; nothing but causality hides keys")
    if asked == "sdpa":
        return AttentionChoice("sdpa", f"scaled_dot_product_attention, the mask of {hidden} written out: asked for")
    model = config.model
    widths = (model.qk_head_dim, model.v_head_dim) if model.attn_type == "mla" else (model.head_dim, model.head_dim)
    why_not = probe(device, dtype, *widths)
    refusals = round(sum_over_ranks([float(why_not is not None)])[0])
    if refusals and why_not is None:
        why_not = f"{refusals} other ranks cannot use it"
    if why_not is None:
        return AttentionChoice("flex", f"scaled_dot_product_attention; flex_attention under {hidden}")
    if asked == "flex":
        raise BadInputError(f'parallel.attention = "flex": {why_not}; use "auto" or "sdpa"')
    return AttentionChoice(
        "sdpa", f"scaled_dot_product_attention, the mask of {hidden} written out (flex_attention: {why_not})"
    )


def _what_hides_keys(config: TrainingConfig) -> str | None:
    """What of the run needs a mask beyond causality, in words; None: nothing."""
    model, longest = config.model, config.data.longest_row
    windows = []
    if model.sliding_window is not None and model.sliding_window < longest:
        windows.append(f"a window of {model.sliding_window}")
    if model.kv_policy == "gated" and model.kv_gate_window < longest:
        windows.append(f"a window of {model.kv_gate_window}")
    if config.data.document_mask:
        windows.append("documents")
    return " and ".join(windows) or None
