"""What decoding remembers: one slot per (layer, loop), since a looped layer sees another state in every loop.

The cache's ``length`` is the only position there is: attention reads where to write and where its queries start from
it, and the model advances it once at the end of a forward. Setting it back (``rewind``) forgets the latest tokens.

``kv_policy`` says which loops' keys and values of the past a looped layer sees (docs/kv_policies.md). The tokens of one
forward see each other in their own loop, whatever the policy.

    per_loop   loop t sees loop t: exact, a slot per loop
    ring       loop t uses slot ``t mod kv_ring_size``, where the latest such loop overwrote the earlier ones
               (Geiping et al. 2025, section 6.2)
    last       a ring of one: the past is seen in its final state
    gated      later loops see loop 0 in full and a window of their own: an architecture, ``gated_loops.py``

``mlca_window`` makes every slot without a sliding window a :class:`~model.attention.mlca.PooledSlot`.
Memory: ``model.parameters.cache_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model.attention.mlca import PooledSlot, Pooling
from model.attention.slot import CacheSlot
from model.config import IceConfig
from model.depth import DepthPlan

SlotKey = tuple[str, int, int]  # (part, layer, loop)


class Cache:
    """The slots of one batch of sequences, all of the same length. :meth:`for_model` builds a configuration's.

    Args:
        loop_slots: Slots of a core layer over its loops; None: one per loop.
        rewindable: How far below the longest length so far ``rewind`` may go.
        gate_window: Tokens the slots of later loops keep (kv_policy = gated); None: all.
        pooling: Pools the older tokens of slots without a window; None: all stay exact.
        coarsest_scale: The largest MSRD scale: a core of scale s runs ``ceil(T / s)`` loops.
    """

    def __init__(
        self,
        loop_slots: int | None = None,
        rewindable: int = 0,
        *,
        gate_window: int | None = None,
        pooling: Pooling | None = None,
        coarsest_scale: int = 1,
    ) -> None:
        self.length = 0
        self.n_loops: int | None = None  # the fewest any forward ran
        self.padding_B: torch.Tensor | None = None  # of the forward that is running; set by its SequenceContext
        self.loop_slots, self.rewindable = loop_slots, rewindable
        self._gate_window, self._pooling, self._coarsest_scale = gate_window, pooling, coarsest_scale
        self._shortest = 0
        self._drafting = False
        self._slots: dict[SlotKey, CacheSlot] = {}

    @classmethod
    def for_model(cls, config: IceConfig, *, kv_policy: str | None = None, rewindable: int = 0) -> Cache:
        """An empty cache as ``config`` wants it.

        Args:
            config: The model.
            kv_policy: Instead of the configuration's; see :meth:`IceConfig.loop_slots`.
            rewindable: As in the constructor.

        Raises:
            ValueError: As :meth:`IceConfig.loop_slots`.
        """
        return cls(
            config.loop_slots(kv_policy),
            rewindable,
            gate_window=config.kv_gate_window if config.kv_policy == "gated" else None,
            pooling=Pooling.of(config),
            coarsest_scale=max(config.msrd_scales),
        )

    def slot(self, part: str, layer: int, loop: int = 0, window: int | None = None) -> CacheSlot:
        """The slot of ``layer`` of ``part`` ("prelude", "core", "core.1", "coda") in ``loop``; made on first use."""
        if self._gate_window is not None and loop > 0:
            window = self._gate_window
        if self.loop_slots is not None:
            loop %= self.loop_slots
        key = (part, layer, loop)
        if key not in self._slots:
            if self._pooling is None or window is not None:
                self._slots[key] = CacheSlot(self, window)
            else:
                self._slots[key] = PooledSlot(self, self._pooling)
        return self._slots[key]

    def rewind(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self._shortest = max(self._shortest, self.length - self.rewindable)
        if not self._shortest <= length <= self.length:
            raise ValueError(
                f"length = {length}: this cache of {self.length} tokens rewinds to at least {max(self._shortest, 0)} "
                f"(rewindable = {self.rewindable})"
            )
        self.length = length

    def select_rows(self, rows_B: torch.Tensor) -> None:
        """Row i of every slot becomes what row ``rows_B[i]`` was, int64: what beam search does to its candidates."""
        for slot in self._slots.values():
            slot.select_rows(rows_B)

    def fix_depth(self, n_loops: int) -> None:
        """Refuse a depth other than the first one's, unless both leave every slot filled.

        A loop without a state of the past has nothing to attend to. With ``loop_slots`` the past of any depth that
        filled them all will do.
        """
        if self._drafting:
            if self.n_loops is None or n_loops > self.n_loops:
                raise ValueError(f"n_loops = {n_loops}: a draft is at most as deep as its cache, {self.n_loops}")
            return
        shallowest = n_loops if self.n_loops is None else min(n_loops, self.n_loops)
        slots_filled = self.loop_slots is not None and -(-shallowest // self._coarsest_scale) >= self.loop_slots
        if self.n_loops not in (None, n_loops) and not slots_filled:
            raise ValueError(f"n_loops = {n_loops}: this cache was filled with n_loops = {self.n_loops}")
        self.n_loops = shallowest

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Inside, forwards may be shallower than the cache; what they add is forgotten at the end."""
        length, self._drafting = self.length, True
        try:
            yield
        finally:
            self._drafting = False
            self.rewind(length)

    def bytes_per_token(self) -> int:
        """Bytes one more token of one sequence takes over all layers and loops; 0 before the first forward."""
        return sum(slot.bytes_per_token() for slot in self._slots.values())

    def bytes_used(self) -> int:
        """Bytes of all buffers, unused room included."""
        return sum(slot.bytes_used() for slot in self._slots.values())


def slot_windows(config: IceConfig, n_loops: int, kv_policy: str | None = None) -> list[int | None]:
    """The sliding window of every slot that a cache of ``config`` has at depth ``n_loops``; None: no window."""
    slots = config.loop_slots(kv_policy)
    once = [config.window(layer) for layers in (config.prelude_layers, config.coda_layers) for layer in range(layers)]
    core = []
    for scale in config.msrd_scales:
        loops = DepthPlan(n_loops).at_scale(scale).n_loops
        for loop in range(loops if slots is None else min(loops, slots)):
            for layer in range(config.recurrent_layers):
                own = config.window(loop * config.recurrent_layers + layer)
                core.append(config.kv_gate_window if config.kv_policy == "gated" and loop > 0 else own)
    return once + core
