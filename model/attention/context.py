"""What attention layers are told besides their input: one ``SequenceContext`` a forward, one ``Site`` a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.attention.cache import Cache
from model.attention.causal import Memory, attention_mask
from model.attention.rope import RopeTables
from model.attention.slot import CacheSlot

if TYPE_CHECKING:
    from model.attention.causal import Mask
    from model.attention.flex import AttentionKernel

# Tensors an attention hands from one loop to the next of the same tokens; what they are is its own affair.
Carry = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class SequenceContext:
    """What all attention layers of one forward share."""

    rope: RopeTables
    cache: Cache | None = None
    padding_B: torch.Tensor | None = None  # int64, tokens at the left of each row that are padding; None: none
    document_ids_BS: torch.Tensor | None = None  # which document each token is of; none sees another; None: all one
    kernel: AttentionKernel = "sdpa"  # who attends where a window or documents hide keys from new tokens
    _masks: dict[tuple[int, int, int, int | None], Mask | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Tell the cache which tokens weigh nothing where it pools."""
        if self.cache is not None:
            self.cache.padding_B = self.padding_B

    def site(self, part: str, layer: int, loop: int = 0, window: int | None = None) -> Site:
        """The place of attention number ``layer`` of ``part`` in ``loop``."""
        slot = None if self.cache is None else self.cache.slot(part, layer, loop, window)
        return Site(self, slot, window, loop)


@dataclass(frozen=True)
class Site:
    """Where an attention layer is called: which loop, which remembered tokens, which window."""

    context: SequenceContext
    slot: CacheSlot | None = None
    window: int | None = None
    loop: int = 0

    @property
    def rope(self) -> RopeTables:
        """The new tokens' rotations."""
        return self.context.rope

    @property
    def past(self) -> int:
        """Tokens read before this forward."""
        return 0 if self.slot is None else self.slot.length

    def remember(self, *tensors: torch.Tensor) -> Memory:
        """The new tokens' rows after those of the past; without a cache, the new ones alone."""
        return Memory(tensors) if self.slot is None else self.slot.append(*tensors)

    def mask(self, queries: int, memory: Memory) -> Mask | None:
        """The mask of ``queries`` new tokens over ``memory``; layers of the same shape share one."""
        # Slots with as many pooled entries and as many rows have pooled the same tokens.
        pooled = 0 if memory.pooled_bias_BP is None else memory.pooled_bias_BP.shape[1]
        key = (queries, memory.tensors[0].shape[-2], pooled, self.window)
        masks = self.context._masks
        if key not in masks:
            mask = self._block_mask(queries, memory)
            masks[key] = (
                mask
                if mask is not None
                else attention_mask(
                    queries, memory, self.window, self.context.padding_B, self.past, self.context.document_ids_BS
                )
            )
        return masks[key]

    def _block_mask(self, queries: int, memory: Memory) -> Mask | None:
        """The mask as blocks, where the context's kernel takes such and a window or documents are all it holds."""
        context, keys = self.context, memory.tensors[0]
        hides_keys = context.document_ids_BS is not None or (self.window is not None and self.window < queries)
        all_new = self.slot is None and memory.pooled_bias_BP is None and keys.shape[-2] == queries
        if context.kernel != "flex" or context.padding_B is not None or not (hides_keys and all_new):
            return None
        from model.attention.flex import block_mask

        window = self.window if self.window is not None and self.window < queries else None
        return block_mask(queries, keys.device, window, context.document_ids_BS)
