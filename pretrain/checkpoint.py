"""Checkpoints that exist when their manifest does.

``checkpoints/step_00000200/`` holds::

    engine/            DeepSpeed's own files: weights, optimizer, one part a rank
    weights/           safetensors under the plain model's names, and the model's config (checkpoint.plain_weights)
    rank_00000.pt      each rank's random generators
    biases.safetensors the routers' selection biases, fp32
    state.json         step, loader position, tokens, W&B id, and what model, data and topology this belongs to
    manifest.json      sha256 and size of every other file: written last, atomically

``checkpoints/latest`` names the newest, after its manifest. Removing deletes the manifest first. Loading takes the
newest checkpoint whose files all have their recorded hash, and says why it passed over a newer one.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from launch.files import fsync_path, path_inside, sha256_of, write_atomically, write_json_atomically
from launch.settings import BadInputError
from pretrain.config import CheckpointSection
from pretrain.data import past_of
from pretrain.engine import TrainingEngine
from pretrain.weights import write_weights

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
STATE = "state.json"
BIASES = "biases.safetensors"
ENGINE = "engine"
WEIGHTS = "weights"


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint belongs to; a resume that differs is refused.

    Of ``data`` only the part that the samples seen so far depend on: what a run will see next may change.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    topology: dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after ``step`` optimizer steps; ``stability`` is what ``StabilityGuard`` remembers (JSON)."""

    step: int
    next_sample: int
    tokens: int
    wandb_id: str | None
    stability: dict[str, Any] = field(default_factory=dict)


def step_folder_name(step: int) -> str:
    """Sorts by step."""
    return f"step_{step:08d}"


class Checkpointer:
    """Saves, prunes and finds the checkpoints of one run directory. All methods are collective."""

    def __init__(
        self,
        folder: Path,
        section: CheckpointSection,
        identity: RunIdentity,
        engine: TrainingEngine,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.section, self.identity, self.engine, self.say = folder, section, identity, engine, say

    def save(self, state: TrainingState) -> None:
        """Write everything a resume needs, commit it, then prune what the retention no longer keeps."""
        engine, target = self.engine, self.folder / step_folder_name(state.step)
        if engine.place.is_first:
            _remove(target)
            target.mkdir(parents=True)
        engine.barrier()
        engine.save(target, ENGINE)
        torch.save(_random_state(), target / _rank_file(engine.place.rank))
        if engine.place.is_first:
            save_file({name: bias.cpu() for name, bias in engine.selection_biases().items()}, target / BIASES)
            write_json_atomically(
                target / STATE, {"format": FORMAT_VERSION, **asdict(state), "identity": asdict(self.identity)}
            )
        if self.section.plain_weights:
            write_weights(target / WEIGHTS, engine.model_config, engine.plain_weights(), engine.place.is_first)
        engine.barrier()
        self._commit(target)
        if engine.place.is_first:
            self._prune()
        engine.barrier()

    def _commit(self, target: Path) -> None:
        names = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
        place = self.engine.place
        mine = {}
        for name in names[place.rank :: place.world_size]:
            fsync_path(target / name)
            mine[name] = {"sha256": sha256_of(target / name), "bytes": (target / name).stat().st_size}
        parts = self.engine.gather_objects(mine)
        if place.is_first:
            files = {name: entry for part in parts for name, entry in part.items()}
            write_json_atomically(target / MANIFEST, {"format": FORMAT_VERSION, "files": files})
            write_atomically(self.folder / LATEST, f"{target.name}\n".encode())

    def _prune(self) -> None:
        committed = _committed(self.folder)
        kept_for_ever = self.section.keep_every
        for target in committed[: -self.section.keep_last]:
            if kept_for_ever is None or _step_of(target) % kept_for_ever:
                _remove(target)

    def poll(self) -> None:
        """Report a failed write; a save is over when :meth:`save` returns, and fails there."""

    def wait(self) -> None:
        """Return when the last save is committed."""

    def resume(self, newest_step: int | None = None) -> TrainingState | None:
        """Load the newest valid checkpoint into the engine; None when the run directory has none.

        With ``newest_step``, the newest of that step or an earlier one: a roll-back. Younger ones are removed then,
        once the older one is loaded, so that no later start continues from what was abandoned.

        Raises ``BadInputError`` when checkpoints exist but none is valid, or when the newest valid one belongs to
        another model, other data or another topology.
        """
        found = self._newest_valid(newest_step)
        if found is None:
            return None
        record = json.loads((found / STATE).read_text())
        self._check_identity(found, record["identity"], record["next_sample"])
        self.engine.load(found, ENGINE)
        biases = self.engine.selection_biases()
        for name, bias in load_file(found / BIASES).items():
            biases[name].copy_(bias)
        _restore_random_state(torch.load(found / _rank_file(self.engine.place.rank), weights_only=True))
        if newest_step is not None and self.engine.place.is_first:
            self._abandon_after(found)
        self.engine.barrier()
        return TrainingState(**{name: record[name] for name in TrainingState.__dataclass_fields__ if name in record})

    def _abandon_after(self, found: Path) -> None:
        write_atomically(self.folder / LATEST, f"{found.name}\n".encode())
        for checkpoint in reversed(_committed(self.folder)):
            if _step_of(checkpoint) > _step_of(found):
                _remove(checkpoint)

    def _newest_valid(self, newest_step: int | None) -> Path | None:
        place = self.engine.place
        # Only the first rank lists the folder: a network file system may show the others an older one.
        committed = [path for path in _committed(self.folder) if newest_step is None or _step_of(path) <= newest_step]
        names: list[str] = self.engine.gather_objects([path.name for path in reversed(committed)])[0]
        for name in names:
            problems = self.engine.gather_objects(find_damage(self.folder / name, place.rank, place.world_size))
            damage = next((problem for problem in problems if problem is not None), None)
            if damage is None:
                return self.folder / name
            self.say(f"checkpoint {name} is damaged and not used: {damage}")
        if names:
            raise BadInputError(
                f"{self.folder}: none of {len(names)} checkpoint(s) is intact; restore one from a copy, or start over "
                "in another run.name"
            )
        return None

    def _check_identity(self, found: Path, saved: dict[str, Any], next_sample: int) -> None:
        current = asdict(self.identity)
        # Through JSON, as the saved one went: tuples become lists.
        current = json.loads(json.dumps(current))
        saved, current = ({**each, "data": past_of(each["data"], next_sample)} for each in (saved, current))
        for part in ("model", "data", "topology"):
            if part in self.section.allow_changed:
                continue
            keys = sorted(set(saved[part]) | set(current[part]))
            changes = [
                f"{part}.{key} was {saved[part].get(key)!r}, is {current[part].get(key)!r}"
                for key in keys
                if saved[part].get(key) != current[part].get(key)
            ]
            if changes:
                remedy = (
                    "resume on the same topology"
                    if part == "topology"
                    else f'use another run.name, or set checkpoint.allow_changed=["{part}"]'
                )
                raise BadInputError(f"{found}: belongs to another {part}: {'; '.join(changes)}; {remedy}")


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with this rank's share of ``checkpoint``'s files, or None when sizes and hashes hold."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name in sorted(files)[rank::world_size]:
            path = path_inside(checkpoint, name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != files[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {files[name]['bytes']}"
            if sha256_of(path) != files[name]["sha256"]:
                return f"{name} has another sha256 than {MANIFEST} records"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be used ({error})"
    return None


def newest_valid_checkpoint(folder: Path) -> Path:
    """The newest intact checkpoint below ``folder``, for a single process that reads it; ``BadInputError`` if none."""
    damage = "no checkpoint was committed there; train first"
    for candidate in reversed(_committed(folder)):
        problem = find_damage(candidate)
        if problem is None:
            return candidate
        damage = f"{candidate.name}: {problem}"
    raise BadInputError(f"{folder}: no usable checkpoint: {damage}")


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _committed(folder: Path) -> list[Path]:
    """Folders with a manifest, oldest first."""
    return sorted((path.parent for path in folder.glob(f"step_*/{MANIFEST}")), key=_step_of)


def _remove(checkpoint: Path) -> None:
    """Un-commit first, so that a crash in between leaves no half checkpoint that looks whole."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)


def _random_state() -> dict[str, Any]:
    """Every generator this process may draw from, as tensors and plain containers (loadable with weights_only)."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
