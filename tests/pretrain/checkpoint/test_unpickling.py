"""A checkpoint that was made up to run code is refused as a whole, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import Run

from launch.files import sha256_of
from launch.settings import BadInputError
from pretrain.checkpoint import MANIFEST
from pretrain.checkpoint.unpickling import find_unsafe, load_data


class Malicious:
    """Unpickling it without restriction makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def put(checkpoint: Path, name: str, value: Any, protocol: int | None) -> None:
    """Replace a file by one that holds ``value``, with a manifest that agrees."""
    path = checkpoint / name
    if protocol is None:
        torch.save(value, path)
    elif protocol < 0:
        path.write_bytes(pickle.dumps(value))  # no file of torch.save at all
    else:
        torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("protocol", [None, -1, 2, 4])
@pytest.mark.parametrize("name", ["engine/weight.pt", "engine/another_rank.pt", "rank_00000.pt"])
def test_a_malicious_file_refuses_the_checkpoint_in_one_line_and_nothing_runs(
    tmp_path: Path, name: str, protocol: int | None
) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    mark = tmp_path / "executed"
    put(run.checkpoints / "step_00000002", name, {"state": [Malicious(mark)], "other": torch.ones(2)}, protocol)
    with pytest.raises(BadInputError) as error:
        Run(tmp_path)
    assert not mark.exists()
    message = str(error.value)
    assert "\n" not in message
    assert f"step_00000002: {name} " in message
    assert "could run code" in message
    assert mark.parent.exists()


def test_the_test_files_do_run_code_where_nothing_is_restricted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would show nothing."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # tests that load the engine's files set it
    run = Run(tmp_path)
    run.save(1)
    mark = tmp_path / "executed"
    path = run.checkpoints / "step_00000001" / "rank_00000.pt"
    put(run.checkpoints / "step_00000001", "rank_00000.pt", [Malicious(mark)], None)
    assert find_unsafe(path.parent) == "rank_00000.pt asks for posix.mkdir"
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_what_a_checkpoint_holds_is_data(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    checkpoint = run.checkpoints / "step_00000001"
    assert find_unsafe(checkpoint) is None
    assert load_data(checkpoint / "engine" / "weight.pt").tolist() == [1, 1, 1]
