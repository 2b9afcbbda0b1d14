"""``metrics.jsonl``: one JSON object for each optimizer step, and one for each evaluation.

The first key tells them apart: training lines have ``loss``, evaluation lines ``validation_bits_per_byte``. A resumed
run first drops the lines after its checkpoint, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.files import write_atomically

FILE_NAME = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class MetricsFile:
    """Appends lines; opened on the first rank only."""

    def __init__(self, path: Path, resumed_step: int, evaluation_due: bool = False) -> None:
        """Keep the lines up to ``resumed_step``, without its evaluation where that is ``evaluation_due`` once more."""
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step]
        if evaluation_due:
            kept = [line for line in kept if line["step"] < resumed_step or "loss" in line]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system; non-finite numbers become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def expert_load_metrics(load_TLE: Tensor) -> dict[str, float]:
    """Imbalance of a step's expert load, from tokens of each (loop, layer, expert).

    ``expert_load_max_over_mean`` is 1 when balanced; ``..._worst_loop`` takes the maximum over (loop, layer) instead of
    summing over loops first, since a collapse in one loop hides in the sum. ``experts_unused`` is the share of
    (loop, layer, expert) that got no token. A layer that did not run in a loop (a coarser scale's) is left out.
    """
    load_TLE = load_TLE.double()
    ran_TL = load_TLE.sum(dim=-1) > 0
    summed_LE = load_TLE.sum(dim=0)
    mean_L = summed_LE.mean(dim=-1).clamp_min(1e-9)
    mean_TL = load_TLE.mean(dim=-1).clamp_min(1e-9)
    return {
        "expert_load_max_over_mean": float((summed_LE.amax(dim=-1) / mean_L).max()),
        "expert_load_worst_loop": float((load_TLE.amax(dim=-1) / mean_TL).max()),
        "experts_unused": float((load_TLE[ran_TL] == 0).double().mean()),
    }
