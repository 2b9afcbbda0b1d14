"""A job may start again while its run gets on, and a few times more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.retry_budget import bad_nodes, begin, end, main, newest_committed_step
from launch.settings import BadInputError


def commit(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def decision(run: Path, capsys: pytest.CaptureFixture[str], retries: int = 2, nodes: int = 2) -> str:
    options = ["--job", "7", "--run", str(run), "--retries", str(retries), "--nodes", str(nodes)]
    assert main(["end", *options]) == 0
    return capsys.readouterr().out.strip()


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    assert newest_committed_step(tmp_path) == -1
    commit(tmp_path, 5)
    commit(tmp_path, 100_000_000)  # more digits than names are padded to
    (tmp_path / "checkpoints" / "step_00000007").mkdir()
    (tmp_path / "checkpoints" / "step_00000009.partial").mkdir()
    (tmp_path / "checkpoints" / "step_00000009.partial" / "manifest.json").touch()
    assert newest_committed_step(tmp_path) == 100_000_000


def test_ends_without_progress_are_counted_and_progress_clears_the_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(tmp_path, 5)
    begin("7", tmp_path)
    assert [decision(tmp_path, capsys) for _ in range(2)] == ["retry", "retry"]
    commit(tmp_path, 10)
    assert [decision(tmp_path, capsys) for _ in range(4)] == ["retry", "retry", "retry", "stop"]


def test_a_requeued_start_goes_on_counting_and_a_new_job_begins_at_0(tmp_path: Path) -> None:
    commit(tmp_path, 5)
    begin("7", tmp_path)
    assert end("7", tmp_path).without_progress == 1
    begin("7", tmp_path)
    assert end("7", tmp_path).without_progress == 2
    begin("8", tmp_path)
    assert end("8", tmp_path).without_progress == 1


def test_starts_that_slurm_ended_itself_may_have_got_on(tmp_path: Path) -> None:
    begin("7", tmp_path)
    assert end("7", tmp_path).without_progress == 1
    begin("7", tmp_path)
    commit(tmp_path, 5)  # then its node died: no end
    begin("7", tmp_path)
    assert end("7", tmp_path).without_progress == 0


def test_why_a_job_stops_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin("7", tmp_path)
    main(["end", "--job", "7", "--run", str(tmp_path), "--retries", "0"])
    shown = capsys.readouterr()
    assert shown.out == "stop\n"
    assert shown.err.startswith("error: 1 starts in a row")
    assert shown.err.count("\n") == 1


def test_bad_hosts_are_named_as_slurm_names_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin("7", tmp_path)
    (tmp_path / "preflight.json").write_text(json.dumps({"bad_hosts": ["b.cluster.org", "a", "a", "--evil", "x y"]}))
    assert decision(tmp_path, capsys, nodes=4) == "retry a,b"


def test_hosts_that_are_all_bad_are_not_excluded(tmp_path: Path) -> None:
    (tmp_path / "preflight.json").write_text(json.dumps({"bad_hosts": ["a", "b"]}))
    assert bad_nodes(tmp_path, nodes=2) == []
    assert bad_nodes(tmp_path, nodes=3) == ["a", "b"]
    (tmp_path / "preflight.json").write_text(json.dumps({"bad_hosts": ["a"]}))
    assert bad_nodes(tmp_path, nodes=1) == ["a"]


def test_begin_checks_the_configuration_and_prints_the_run_directory(
    tmp_path: Path, repository_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = ["--config", str(repository_root / "configs" / "ice_50b.json"), "--set", f"run.dir={tmp_path}"]
    assert main(["begin", "--job", "7", "--tasks", "128", *training, "--set", "run.name=x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}\n"
    assert (tmp_path / "x" / "slurm" / "retries.json").exists()
    with pytest.raises(BadInputError, match=r"global_batch_size = 512: must be a multiple of .* ranks = 1 x 24 = 24"):
        main(["begin", "--job", "7", "--tasks", "24", *training, "--set", "run.name=y"])
    assert not (tmp_path / "y").exists()
