"""What the engine does with memory and wires by default, as far as the plan must know it.

DeepSpeed's own names and defaults (``deepspeed/runtime/zero/config.py``, 0.19.8), in elements, not bytes. A run uses
the defaults; the tests and benchmarks that compare the plan with small runs say what they set instead.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """ZeRO's knobs that decide what is alive when."""

    param_persistence_threshold: int = 100_000  # a parameter up to this size stays gathered for ever
    max_reuse_distance: int = 1_000_000_000  # one that is used again within so many elements is not released
    max_live_parameters: int = 1_000_000_000  # nothing is prefetched while more are gathered
    prefetch_bucket_size: int = 50_000_000  # elements fetched ahead of their use
    reduce_bucket_size: int = 500_000_000  # gradients collected before they are reduced: a buffer of this size
    sub_group_size: int = 1_000_000_000  # elements the ZeRO-3 optimizer steps at once


DEFAULTS = EngineSettings()

NOTHING_KEPT = EngineSettings(0, 0, 0, 0)
"""As in a model too large to keep anything: every use of a parameter gathers it."""
