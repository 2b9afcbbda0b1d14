"""Each check by itself, on made-up machines, and the command on this one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import preflight
from launch.environment import Place
from launch.settings import load_settings, parse_settings
from pretrain.config import TrainingConfig

ALONE = Place(0, 1)


def config_in(folder: Path, **sections: dict[str, Any]) -> TrainingConfig:
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "runs")},
        "model": {"variant": "ice_tiny"},
        "data": {"path": "none", "global_batch_size": 4, "sequence_length": 16},
        "precision": {"dtype": "fp32"},
    }
    return parse_settings(TrainingConfig, {**values, **sections}, "test")


def test_a_checkpoint_is_as_large_as_it_is(tmp_path: Path) -> None:
    # The demo's, ZeRO-3 in fp32 with plain weights, took 30,248,048 bytes on two ranks.
    assert preflight.checkpoint_bytes(config_in(tmp_path)) == pytest.approx(30_248_048, rel=0.01)


def test_too_little_disk_is_told_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path, checkpoint={"keep_last": 4, "keep_every": 500}, schedule={"steps": 1000})
    assert preflight.kept_checkpoints(config) == 4 + 2 + 1
    one = preflight.checkpoint_bytes(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7 * one))
    assert preflight.check_disk(config).wrong is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7 * one - 1))
    finding = preflight.check_disk(config)
    assert finding.wrong == "input"
    assert "needed for checkpoints of 28.7 MiB" in finding.detail
    # Those that are there already need no room.
    for step in (500, 600):
        manifest = config.run.path / "checkpoints" / f"step_{step:08d}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    assert preflight.check_disk(config).wrong is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    finding = preflight.check_disk(config_in(tmp_path))
    assert (finding.wrong, "cannot be written" in finding.detail) == ("input", True)


def test_another_version_is_told_by_host() -> None:
    usual = {"python": "3.11.7", "torch": "2.13.0"}
    well = preflight.compare_versions([("a", usual), ("b", usual)])
    assert well.wrong is None
    finding = preflight.compare_versions([("a", usual), ("b", {**usual, "torch": "2.12.1"}), ("c", usual)])
    assert (finding.wrong, finding.hosts) == ("input", ("b",))
    assert "torch 2.12.1 on b, 2.13.0 elsewhere" in finding.detail


def test_a_clock_that_is_off_is_told_by_host() -> None:
    finding = preflight.compare_clocks([("a", 1000.0), ("b", 1000.2), ("c", 940.0)])
    assert (finding.wrong, finding.hosts) == ("machine", ("c",))
    assert "c by -60.0 s" in finding.detail
    assert preflight.compare_clocks([("a", 1000.0), ("b", 1000.2)]).wrong is None


@pytest.mark.parametrize("hosts", [3, 4, 5, 8])
def test_the_slow_host_of_a_ring_is_named_and_its_neighbours_are_not(hosts: int) -> None:
    names = [f"node{number}" for number in range(hosts)]
    ring = [(names[index], names[(index + 1) % hosts]) for index in range(hosts)]
    rounds = preflight.rounds_of(ring)
    assert sorted(pair for pairs in rounds for pair in pairs) == sorted(ring)
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in rounds)
    seconds = {pair: 0.5 if "node1" in pair else 0.1 for pair in ring}
    slow = preflight.slow_hosts(seconds)
    # Of three hosts, two pairs are slow and the third tells which host they share.
    assert set(slow) == {"node1"}
    assert slow["node1"] == pytest.approx(5)
    assert preflight.slow_hosts(dict.fromkeys(ring, 0.1)) == {}


def test_two_hosts_cannot_tell_which_is_slow() -> None:
    assert preflight.slow_hosts({("a", "b"): 9.0}) == {}


@pytest.mark.parametrize(
    ("wrong", "status", "bad"),
    [
        ([None, None], 0, []),
        ([None, "machine"], 1, ["node1"]),
        (["input", None], 78, []),
        (["input", "machine"], 78, ["node1"]),
    ],
)
def test_the_report_has_the_status_and_the_hosts_to_leave_out(
    tmp_path: Path, wrong: list[Any], status: int, bad: list[str]
) -> None:
    findings = [preflight.Finding("check", "detail", kind, (f"node{index}",)) for index, kind in enumerate(wrong)]
    assert preflight.exit_status(findings) == status
    preflight.write_report(tmp_path / "run" / "preflight.json", findings)
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert (report["status"], report["bad_hosts"]) == (status, bad)


def test_the_command_on_this_machine(
    tmp_path: Path, repository_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "prepare_rendezvous", lambda place: None)  # it would make this process a rank
    monkeypatch.setattr(
        preflight, "join", lambda place: (preflight.Finding("rendezvous", "met"), lambda value: [value])
    )
    config = repository_root / "configs" / "ice_tiny.json"
    overrides = ["--set", f"run.dir={tmp_path}", "--set", f"data.path={tmp_path / 'none'}"]
    overrides += ["--set", "parallel.expert_parallel_size=1"]
    assert preflight.main(["--config", str(config), *overrides]) == 78
    output = capsys.readouterr().out
    assert "error: data:" in output
    name = load_settings(TrainingConfig, config).run.name
    report = json.loads((tmp_path / name / preflight.FILE_NAME).read_text())
    checks = [finding["check"] for finding in report["findings"]]
    assert checks == ["rendezvous", "disk space", "data", "memory", "versions", "clocks", "links"]
    assert [finding["check"] for finding in report["findings"] if finding["wrong"]] == ["data"]
    assert sys.version.split()[0] in output
