"""The engine's files are mapped when a run resumes: another copy of a rank's state would not fit beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.engine import _mapped_reader

BYTES = 2**26


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def test_a_file_of_the_engine_is_read_without_a_copy_in_memory(tmp_path: Path) -> None:
    saved = torch.arange(BYTES // 4, dtype=torch.float32)
    torch.save({"state": saved}, tmp_path / "rank.pt")
    reader = _mapped_reader()
    before = anonymous_bytes()
    state = reader.load(str(tmp_path / "rank.pt"), map_location="cpu")["state"]
    assert state.sum() == saved.sum()  # every page was looked at
    assert anonymous_bytes() - before < BYTES // 8
    state.add_(1)  # what an optimizer does with the states that it takes over
    assert torch.equal(torch.load(tmp_path / "rank.pt", weights_only=True)["state"], saved)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_it_restores_nothing_but_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state": Harmful()}, tmp_path / "rank.pt")
    with pytest.raises(Exception, match="print"):
        _mapped_reader().load(str(tmp_path / "rank.pt"))
    assert "executed" not in capsys.readouterr().out
