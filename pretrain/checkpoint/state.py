"""Where a run stands, and what its checkpoints belong to: ``state.json``."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launch.settings import BadInputError
from model import IceConfig
from pretrain.checkpoint.layout import STATE
from pretrain.data import past_of

FORMAT_VERSION = 1
# What of the topology may differ from a checkpoint's: it is then converted (universal.py). The dtype may between bf16
# and fp32; fp16 has a loss scale, which the other form does not keep. Sub-groups cut ZeRO-3's partitions.
ELASTIC = ("ranks", "expert_parallel_size", "dtype", "sub_group_size")

_DEFAULTS: dict[str, Any] = IceConfig().model_dump(mode="json")


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
    """Where a run stands after ``step`` optimizer steps."""

    step: int
    next_sample: int
    tokens: int
    wandb_id: str | None
    validation_bits_per_byte: float | None = None  # of an evaluation at this very step
    stability: dict[str, Any] = field(default_factory=dict)  # what the detection of faults remembers; JSON


def encode_state(state: TrainingState, identity: RunIdentity) -> bytes:
    """The content of ``state.json``."""
    record = {"format": FORMAT_VERSION, **asdict(state), "identity": asdict(identity)}
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()


def read_record(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` as it was written."""
    record: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return record


def decode_state(record: dict[str, Any]) -> TrainingState:
    """The state in a record; what an older version did not record has its default."""
    return TrainingState(**{each.name: record[each.name] for each in fields(TrainingState) if each.name in record})


def require_same_identity(
    checkpoint: Path, record: dict[str, Any], identity: RunIdentity, allow_changed: Collection[str]
) -> None:
    """Raise ``BadInputError`` with every difference between the run and the checkpoint that is not allowed.

    Other ranks, sub-groups and another dtype are, if ZeRO has partitioned the state.
    """
    if record["identity"]["topology"].get("imported"):
        run = checkpoint.parent.parent
        raise BadInputError(
            f"{checkpoint}: was imported and holds weights only, nothing to go on from; start another run from them: "
            f"run.init_from = {run}"
        )
    # Through JSON, as the saved one went: tuples become lists.
    current = json.loads(json.dumps(asdict(identity)))
    next_sample = record["next_sample"]
    saved, current = ({**each, "data": past_of(each["data"], next_sample)} for each in (record["identity"], current))
    # A field that did not exist when the checkpoint was written has had its default ever since.
    for each in (saved, current):
        each["model"] = _DEFAULTS | each["model"]
    # The universal format has Adam's moments; Muon's momentum it has not.
    partitioned = saved["topology"].get("zero_stage") and "optimizer" not in saved["topology"]
    elastic = set(ELASTIC) if partitioned else set()
    if "fp16" in (saved["topology"].get("dtype"), current["topology"].get("dtype")):
        elastic -= {"dtype"}
    for part in ("model", "data", "topology"):
        if part in allow_changed:
            continue
        keys = sorted(set(saved[part]) | set(current[part]))
        changes = [
            f"{part}.{key} was {saved[part].get(key)!r}, is {current[part].get(key)!r}"
            for key in keys
            if saved[part].get(key) != current[part].get(key) and not (part == "topology" and key in elastic)
        ]
        if changes:
            remedy = (
                "resume on the same topology (ranks, expert parallelism, sub_group_size and bf16 or fp32 may change, "
                "and not with zero_stage 0 or Muon)"
                if part == "topology"
                else f'use another run.name, or set checkpoint.allow_changed=["{part}"]'
            )
            raise BadInputError(f"{checkpoint}: belongs to another {part}: {'; '.join(changes)}; {remedy}")


def is_reshaped(record: dict[str, Any], identity: RunIdentity) -> bool:
    """Whether the checkpoint must be converted: ``require_same_identity`` has let other ranks or another dtype pass."""
    saved = record["identity"]["topology"]
    return any(saved.get(key) != identity.topology.get(key) for key in ELASTIC)
