"""What came of a sweep: ``results.jsonl``, a row for each finished cell, in the grid's order.

A row is made from the cell's run directory alone, and the file is always written whole, by one process at a time (it
holds the sweep's lock), so it can be thrown away and made again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.files import write_atomically
from launch.settings import read_json_object
from launch.sweeping.folder import RECORD, CellFolder

RESULTS = "results.jsonl"
EVALUATION = "evaluation.json"  # what pretrain/evaluate.py writes into a run
LAST_SHARE = 0.1  # of the steps, over which the training loss is averaged


def result_row(folder: CellFolder) -> dict[str, Any]:
    """The row of a finished cell; losses in nats a token."""
    from pretrain.metrics import FILE_NAME, read_metrics

    cell, record = folder.cell, read_json_object(folder.path / RECORD)
    lines = read_metrics(folder.path / FILE_NAME)
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "validation_bits_per_byte" in line][-1]
    last = [line["loss"] for line in training[-max(1, round(LAST_SHARE * len(training))) :] if line["loss"] is not None]
    budget = cell.budget
    return {
        "cell": cell.name,
        "size": cell.size,
        "seed": cell.seed,
        "mean_loops": cell.mean_loops,
        "flops_level": cell.flops_level,
        "parameters": {
            "total": budget.parameters,
            "active": budget.active_parameters,
            "non_embedding": budget.non_embedding_parameters,
            "once": budget.once_parameters,
            "recurrent": budget.recurrent_parameters,
            "active_recurrent": budget.active_recurrent_parameters,
        },
        "steps": cell.steps,
        "tokens": training[-1]["tokens"],
        "training_flops": budget.training_flops,
        "train_loss": sum(last) / len(last) if last else None,
        "validation_loss": evaluation["validation_nats_per_token"],
        "bits_per_byte": evaluation["validation_bits_per_byte"],
        "by_loops": losses_by_loops(folder),
        "seconds": sum(line["step_seconds"] for line in training),
        "skipped_steps": training[-1].get("skipped_steps", 0),
        "config_hash": folder.hash,
        "data": record["data"],
        "versions": record["versions"],
        "budget": asdict(budget),
    }


def losses_by_loops(folder: CellFolder) -> dict[str, dict[str, float]] | None:
    """Held-out losses of a finished cell by depth at test time; None until its last checkpoint has been evaluated so.

    ``{"4": {"validation_loss": nats a token, "bits_per_byte": ...}, ...}``, from ``pretrain/evaluate.py``.
    """
    from pretrain.checkpoint import step_folder_name

    path = folder.path / EVALUATION
    if not path.is_file():
        return None
    found = read_json_object(path)
    if found["checkpoint"] != step_folder_name(folder.cell.steps):
        return None
    return {
        loops: {"validation_loss": losses["nats_per_token"], "bits_per_byte": losses["bits_per_byte"]}
        for loops, losses in found["by_loops"].items()
    }


def write_results(path: Path, folders: list[CellFolder]) -> list[dict[str, Any]]:
    """Write ``results.jsonl`` of the sweep in ``path`` from all finished cells; its rows."""
    rows = [result_row(folder) for folder in folders if folder.is_finished()]
    write_atomically(path / RESULTS, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows
