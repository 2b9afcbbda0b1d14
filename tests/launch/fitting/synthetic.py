"""Rows as a sweep writes them, of models whose losses follow a known law: what a fit must find again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Of the size of published ones.
LAW = {"E": 1.8, "A": 350.0, "alpha": 0.33, "B": 600.0, "beta": 0.30, "phi": 0.45}
WIDTHS = (128, 192, 256, 384, 512)
LEVELS = (1e16, 4e16, 1.6e17)
DEPTHS = (1, 2, 4, 8)
VOCABULARY = 4096

Loss = Callable[[float, float, int, float], float]  # of N_once, N_rec, T, D


def parameters_of(width: int) -> tuple[int, int]:
    """``N_once, N_rec``; a narrow model has relatively more of the former."""
    return 24 * width * width + 200 * width, 40 * width * width


def token_flops(width: int, loops: float) -> float:
    """Training FLOPs of a token: matrices, and the head."""
    once, recurrent = parameters_of(width)
    return 6 * (once + loops * recurrent + VOCABULARY * width)


def looped_loss(law: Mapping[str, float] = LAW) -> Loss:
    """The looped law's."""

    def loss(once: float, recurrent: float, loops: int, tokens: float) -> float:
        effective = once + loops ** law["phi"] * recurrent
        return float(law["E"] + law["A"] * effective ** -law["alpha"] + law["B"] * tokens ** -law["beta"])

    return loss


def make_row(width: int, loops: int, tokens: float, loss: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of ``results.jsonl``."""
    once, recurrent = parameters_of(width)
    tables = 2 * VOCABULARY * width
    cell = f"t{tokens:.6g}-d{width}-r{loops}-s{seed}"
    return {
        "cell": cell,
        "size": f"d{width}",
        "seed": seed,
        "mean_loops": loops,
        "flops_level": None,
        "parameters": {
            "total": once + 4 * recurrent + tables,
            "active": once + recurrent + tables,
            "non_embedding": once + 4 * recurrent,
            "once": once,
            "recurrent": 4 * recurrent,
            "active_recurrent": recurrent,
        },
        "steps": 1000,
        "tokens": round(tokens),
        "training_flops": token_flops(width, loops) * round(tokens),
        "train_loss": loss,
        "validation_loss": loss,
        "bits_per_byte": loss / math.log(2) / 3,
        "by_loops": None,
        "seconds": 1.0,
        "skipped_steps": 0,
        "config_hash": hashlib.sha256(cell.encode()).hexdigest()[:12],
        "data": {"data/demo": "f" * 64},
        "versions": {},
        "budget": {"executed_loops": float(loops)},
        **changes,
    }


def isoflop_rows(
    loss: Loss,
    noise: float = 0.0,
    *,
    seed: int = 0,
    widths: Iterable[int] = WIDTHS,
    levels: Iterable[float] = LEVELS,
    depths: Iterable[int] = DEPTHS,
) -> list[dict[str, Any]]:
    """A sweep over FLOP levels; ``noise`` is the standard deviation of log losses."""
    generator = np.random.default_rng(seed)
    rows = []
    for level in levels:
        for width in widths:
            for loops in depths:
                tokens = level / token_flops(width, loops)
                value = loss(*map(float, parameters_of(width)), loops, tokens) * math.exp(generator.normal(0, noise))
                rows.append(make_row(width, loops, tokens, value, flops_level=level))
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """As a sweep does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
