"""A finished cell with real weights, evaluated by depth: the losses in its row are the model's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_sweep import STEPS, base_settings

from launch.files import sha256_of
from launch.sweep import load_sweep, main
from model import IceModel
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.manifest import write_manifest
from pretrain.data import held_out_sets, open_main, validation_batches
from pretrain.weights import weight_files


def test_a_cells_losses_by_depth_are_those_of_its_weights(
    write_sweep: Callable[..., Path], small_data: Path, tmp_path: Path
) -> None:
    path = write_sweep(base_settings(small_data), sizes={"d16": {}})
    (folder,) = load_sweep(path)[1]
    config = folder.cell.config
    folder.prepare().replace(folder.path / "config.json")
    folder.prepare()
    torch.manual_seed(0)
    model = IceModel(config.model).eval()
    checkpoint = folder.path / "checkpoints" / f"step_{STEPS:08d}"
    (checkpoint / "weights").mkdir(parents=True)
    entries = {}
    for name, write in weight_files(config.model, model.state_dict().items(), is_first=True).items():
        file = checkpoint / "weights" / name
        with file.open("wb") as opened:
            write(opened)
        entries[f"weights/{name}"] = FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file))
    write_manifest(checkpoint, entries)
    lines = [
        {"step": STEPS, "loss": 5.0, "loops": 2, "tokens": STEPS * 128, "step_seconds": 0.5},
        {"step": STEPS, "validation_bits_per_byte": 2.5, "validation_nats_per_token": 4.5},
    ]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert main([str(path), "--evaluate", "1,3"]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "runs" / "small" / "results.jsonl").read_text().splitlines()]
    assert set(row["by_loops"]) == {"1", "3"}
    assert row["by_loops"]["1"] != row["by_loops"]["3"]
    (held_out,) = held_out_sets(config.data, open_main(config.data))
    for loops in (1, 3):
        total, tokens = 0.0, 0
        for batch in validation_batches(held_out, 2, 0, 1, None, config.data.document_mask):
            with torch.no_grad():
                logits = model(batch.input_ids, loops).flatten(0, 1)
            counted = batch.targets.flatten() >= 0
            losses = torch.nn.functional.cross_entropy(logits, batch.targets.flatten().clamp_min(0), reduction="none")
            total, tokens = total + losses[counted].sum().item(), tokens + int(counted.sum())
        assert row["by_loops"][str(loops)]["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)
