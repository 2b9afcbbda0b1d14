"""A cell on the disk: its run directory, which also remembers what the cell means.

``plan.json``   the configuration that training is started with, beside the run's own files
``cell.json``   its hash, the fingerprints of its data, the versions it was last started with: written last

A cell is finished when its run says so: the last step is committed and has its evaluation. A cell *means* what decides
its numbers: model, data, optimizer, seed and so on, but not where it lies, how often it saves or what it logs. When the
sweep's file would make an existing cell mean something else, that is refused: results must not mix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.files import write_json_atomically
from launch.settings import BadInputError, parse_settings, read_json_object, render_value
from launch.sweeping.grid import Cell

if TYPE_CHECKING:
    from pretrain.config import TrainingConfig

PLAN, RECORD, LOCK, LOG = "plan.json", "cell.json", "cell.lock", "train.log"
_TAIL_BYTES = 64 * 1024

# Settings that leave a run's numbers as they are: whole sections, and single keys.
_NO_MEANING = (
    *("run.name", "run.dir", "run.preflight", "checkpoint", "watchdog", "stragglers", "logging"),
    *("data.prefetch_workers", "data.prefetch_steps", "data.read_timeout_seconds", "data.cache"),
    *("eval.every", "eval.micro_batch_size"),
)


@dataclass(frozen=True)
class CellFolder:
    """Cell number ``index`` of a sweep, and its run directory."""

    index: int
    cell: Cell
    data: dict[str, str]  # fingerprint of each data set

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.cell.config.run.path

    @property
    def hash(self) -> str:
        """Of what the cell means."""
        meaning = {"settings": meaning_of(self.cell.config), "data": self.data}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:12]

    def check(self, source: Path) -> None:
        """``BadInputError`` when the folder was begun as another cell of this name; ``source`` is the sweep's file."""
        if not (self.path / RECORD).exists():
            if any(self.path.glob("checkpoints/step_*")):
                raise BadInputError(
                    f"{self.path}: holds checkpoints of a run that is no cell of a sweep; rename the sweep in {source}"
                )
            return
        old = meaning_of(self._planned())
        new = meaning_of(self.cell.config)
        old["data"], new["data"] = read_json_object(self.path / RECORD).get("data"), self.data
        change = next(difference(old, new), None)
        if change is None:
            return
        key, was, wanted = change
        raise BadInputError(
            f"{source}: cell {self.cell.name}: {key} = {render_value(wanted)}: {self.path} was begun with "
            f"{render_value(was)}; give the sweep another name, or remove that folder to run the cell anew"
        )

    def prepare(self) -> Path:
        """Write plan and record for the start that follows; the plan's path. A W&B run keeps its id."""
        from launch.preflight import software_versions
        from pretrain.tracking import new_wandb_id

        wandb_id = self._planned().logging.wandb_id if (self.path / PLAN).exists() else None
        logging = self.cell.config.logging.model_copy(update={"wandb_id": wandb_id or new_wandb_id()})
        config = self.cell.config.model_copy(update={"logging": logging})
        self.path.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.path / PLAN, config.model_dump(mode="json"))
        versions = {name: value for name, value in software_versions(config).items() if name != "settings"}
        write_json_atomically(self.path / RECORD, {"hash": self.hash, "data": self.data, "versions": versions})
        return self.path / PLAN

    def is_finished(self) -> bool:
        """Whether the last step is committed and evaluated."""
        from pretrain.checkpoint import MANIFEST, step_folder_name

        last = self.path / "checkpoints" / step_folder_name(self.cell.steps) / MANIFEST
        return last.is_file() and any(
            line["step"] == self.cell.steps and "validation_bits_per_byte" in line for line in last_metrics(self.path)
        )

    def last_step(self) -> dict[str, Any] | None:
        """The newest training line of its metrics."""
        return next((line for line in reversed(last_metrics(self.path)) if "loss" in line), None)

    def _planned(self) -> TrainingConfig:
        from pretrain.config import TrainingConfig

        return parse_settings(TrainingConfig, read_json_object(self.path / PLAN), str(self.path / PLAN))


def open_cells(cells: list[Cell], source: Path) -> list[CellFolder]:
    """The folders of all ``cells``, checked; ``BadInputError`` also when their data is missing or damaged."""
    from data_pipeline.dataset.reader import open_dataset

    fingerprints: dict[str, str] = {}
    folders = []
    for index, cell in enumerate(cells):
        paths = sorted({cell.config.data.path, *(part.path for part in cell.config.data.all_sources)})
        for path in paths:
            if path not in fingerprints:
                fingerprints[path] = open_dataset(Path(path)).manifest.fingerprint
        folders.append(CellFolder(index, cell, {path: fingerprints[path] for path in paths}))
    for folder in folders:
        folder.check(source)
    return folders


def last_metrics(run: Path) -> list[dict[str, Any]]:
    """The last whole lines of a run's ``metrics.jsonl``, which may be long."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in (lines[:-1] if size <= _TAIL_BYTES else lines[1:-1]) if line]


def meaning_of(config: TrainingConfig) -> dict[str, Any]:
    """The settings of ``config`` that decide its numbers, flat: ``{"model.dim": 64, ...}``."""
    flat = dict(_flatten("", config.model_dump(mode="json")))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == left_out or key.startswith(f"{left_out}.") for left_out in _NO_MEANING)
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """``(key, old value, new value)`` of each key whose values differ."""
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value
