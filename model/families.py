"""Named sizes of the families beside Ice: functions whose keyword arguments replace fields, as in ``variants.py``.

``apex_small`` is the size that Apex's description gives as its default; ``rrslm_1_5m`` and ``rrslm_800m`` are the two
that RR-SLM's names. What the descriptions leave open (feed-forward widths, layers of the large one) is solved for the
name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model.config import IceConfig
from model.variants import VARIANTS


def apex_small(**overrides: Any) -> IceConfig:
    """Apex: dim 512, 2 prelude and 4 shared layers, window 128, full attention every 4th layer, 3 steps."""
    return _apex(
        overrides,
        dim=512,
        prelude_layers=2,
        recurrent_layers=4,
        max_loop_iters=3,
        n_heads=8,
        n_kv_heads=2,
        sliding_window=128,
        ffn_dim=1408,
        max_seq_len=2048,
        max_output_tokens=1024,
    )


def apex_base(**overrides: Any) -> IceConfig:
    """Apex at twice the width and depth: dim 1024, 4 prelude and 8 shared layers, window 256, 4 steps."""
    return _apex(
        overrides,
        dim=1024,
        prelude_layers=4,
        recurrent_layers=8,
        max_loop_iters=4,
        n_heads=16,
        n_kv_heads=4,
        sliding_window=256,
        ffn_dim=2816,
        max_seq_len=4096,
        max_output_tokens=2048,
    )


def rrslm_1_5m(**overrides: Any) -> IceConfig:
    """RR-SLM: dim 256, 1.5M parameters, up to 5 iterations, the 13 characters of addition."""
    return _rrslm(
        overrides,
        vocab_size=13,
        dim=256,
        prelude_layers=1,
        recurrent_layers=1,
        coda_layers=0,
        n_heads=4,
        n_kv_heads=4,
        ffn_dim=512,
        max_seq_len=256,
        max_output_tokens=32,
    )


def rrslm_800m(**overrides: Any) -> IceConfig:
    """RR-SLM: 800M parameters for text, up to 5 iterations of 8 layers."""
    return _rrslm(
        overrides,
        vocab_size=32000,
        dim=2048,
        prelude_layers=4,
        recurrent_layers=8,
        coda_layers=3,
        n_heads=16,
        n_kv_heads=4,
        ffn_dim=5632,
        max_seq_len=4096,
        max_output_tokens=2048,
    )


def _apex(overrides: dict[str, Any], **fields: Any) -> IceConfig:
    family: dict[str, Any] = {
        "core": "apex",
        "vocab_size": 32000,
        "coda_layers": 0,
        "full_attention_every": 4,
        "memory_slots": 4,
        "n_experts": 0,
    }
    return IceConfig.model_validate(family | fields | overrides)


def _rrslm(overrides: dict[str, Any], **fields: Any) -> IceConfig:
    family: dict[str, Any] = {
        "core": "refine",
        "max_loop_iters": 5,
        "convergence_eps": 0.03,
        "qk_norm": True,
        "n_experts": 0,
    }
    return IceConfig.model_validate(family | fields | overrides)


FAMILIES: dict[str, Callable[..., IceConfig]] = {
    build.__name__: build for build in (apex_small, apex_base, rrslm_1_5m, rrslm_800m)
}
PRESETS: dict[str, Callable[..., IceConfig]] = VARIANTS | FAMILIES
