"""A finished piece is kept, a half-done one never counts, whatever is left lying about."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.base import PipelineStep
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.pieces import PieceFailedError, Work
from launch.settings import BadInputError

StepFor = Callable[..., PipelineStep]
ContentsOf = Callable[[Path], dict[str, str]]
WholeOutput = Callable[[int], dict[str, str]]


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Path]:
    """Folders for the attempts at one stage, new ones each time."""
    return (tmp_path / f"stage-0123.{number:08d}.partial" for number in range(10))


def run(folder: Path, step: PipelineStep, pieces: int = 4) -> None:
    folder.mkdir()
    LocalExecutor(1).run([step], pieces, folder / "logs")


def test_the_next_attempt_takes_over_what_is_finished_and_does_the_rest(
    attempts: Iterator[Path], step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    first, second, third = (next(attempts) for _ in range(3))
    with pytest.raises(BadInputError, match="input 2: is bad"):
        run(first, step_for(first, bad=[2]))
    before = (first / "documents" / "00001.txt").stat()
    with pytest.raises(
        PieceFailedError, match=r"stage, piece 3 of 4: ZeroDivisionError: a bug in two lines; traceback"
    ):
        run(second, step_for(second, broken=[3], bad=[0, 1]))
    run(third, step_for(third, bad=[0, 1, 2]))
    assert contents_of(third) == whole_output(4)
    after = (third / "documents" / "00001.txt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_late_writer_of_an_earlier_attempt_changes_nothing(
    attempts: Iterator[Path], step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    first, second = next(attempts), next(attempts)
    with pytest.raises(BadInputError):
        run(first, step_for(first, bad=[1]))
    late = (first / "documents" / "00001.txt").open("a")
    run(second, step_for(second))
    with late:
        late.write("too late\n")
    (first / "documents").mkdir(exist_ok=True)
    (first / "documents" / "00000.txt").write_text("too late\n")
    assert contents_of(second) == whole_output(4)


@pytest.mark.parametrize("damage", ["truncate", "remove", "pieces"])
def test_a_piece_whose_files_are_not_what_its_record_says_is_done_again(
    damage: str, attempts: Iterator[Path], step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    first, second = next(attempts), next(attempts)
    run(first, step_for(first), pieces=2 if damage == "pieces" else 4)
    if damage == "truncate":
        os.truncate(first / "documents" / "00002.txt", 5)
    elif damage == "remove":
        (first / "documents" / "00002.txt").unlink()
    run(second, step_for(second))
    assert contents_of(second) == whole_output(4)


@settings(max_examples=60)
@given(
    record=st.one_of(
        st.binary(max_size=30),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from(["files", "pieces", "../out", "/etc/passwd"]), inner, max_size=3),
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_a_damaged_record_is_no_record_and_moves_nothing(
    record: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stages")
    first, second = folder / "stage-0.a.partial", folder / "stage-0.b.partial"
    (first / "logs" / "pieces").mkdir(parents=True)
    (first / "logs" / "pieces" / "00000.json").write_bytes(record)
    (folder / "out").write_text("not ours")
    if Work(b"", 1, second / "logs").start() == []:  # the one thing to be taken over is a record without files
        assert json.loads(record) == {"files": {}, "pieces": 1}
    assert (folder / "out").exists()


def test_a_file_outside_of_the_attempt_is_never_taken_over(tmp_path: Path) -> None:
    first, second = tmp_path / "stage-0.a.partial", tmp_path / "stage-0.b.partial"
    (first / "logs" / "pieces").mkdir(parents=True)
    (tmp_path / "mine").write_text("four")
    record = {"files": {"../mine": 4}, "pieces": 1}
    (first / "logs" / "pieces" / "00000.json").write_text(json.dumps(record))
    assert Work(b"", 1, second / "logs").start() == [0]
    assert (tmp_path / "mine").exists()


def test_two_pipelines_of_a_stage_that_share_a_folder_for_logs_are_refused(
    attempts: Iterator[Path], step_for: StepFor
) -> None:
    folder = next(attempts)
    run(folder, step_for(folder))
    with pytest.raises(RuntimeError, match="another folder for logs"):
        LocalExecutor(1).run([step_for(folder)], 4, folder / "logs")
    LocalExecutor(1).run([step_for(folder)], 4, folder / "logs" / "second")


def test_a_file_written_behind_the_back_of_python_is_refused(attempts: Iterator[Path]) -> None:
    folder = next(attempts)

    def secretly(data: Any, rank: int = 0, world_size: int = 1) -> None:
        subprocess.run(["touch", str(folder / "secret")], check=True)

    folder.mkdir()
    with pytest.raises(RuntimeError, match="secret was written behind the back of Python"):
        LocalExecutor(1).run([secretly], 1, folder / "logs")  # type: ignore[list-item]


def test_a_file_that_two_pieces_write_is_refused(attempts: Iterator[Path]) -> None:
    folder = next(attempts)

    def share(data: Any, rank: int = 0, world_size: int = 1) -> None:
        with (folder / "shared").open("a") as file:
            file.write(f"{rank}\n")

    folder.mkdir()
    with pytest.raises(RuntimeError, match="pieces 0 and 1 both wrote shared"):
        LocalExecutor(1).run([share], 2, folder / "logs")  # type: ignore[list-item]


def test_a_full_disk_is_named_and_not_blamed_on_the_code(attempts: Iterator[Path], step_for: StepFor) -> None:
    folder = next(attempts)
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(BadInputError, match=r"piece 1 of 4: .* \(No space left on device\); make room or .*, then run"):
        run(folder, step_for(folder, broken=[1], error=error))


def test_more_pieces_than_file_names_can_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="at most 100000"):
        Work.of([], 100_001, tmp_path)


def test_outside_of_stages_nothing_is_recorded(tmp_path: Path, step_for: StepFor) -> None:
    for _ in range(2):
        LocalExecutor(1).run([step_for(tmp_path)], 2, tmp_path / "logs")
    assert not list(tmp_path.rglob("pieces"))
