"""A disk that is really full: a tiny file system in memory, made a little larger after each run that it stopped.

Each run ends with one line and nothing half published, and goes on where the one before had to stop; the last one's
bytes are those of a run that had room from the start. Mounting needs root.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.config import DataSettings
from data_pipeline.dataset.reader import open_dataset
from launch.settings import BadInputError

pytestmark = pytest.mark.mount

PLENTY_KB, FIRST_KB, GROWTH = 64_000, 100, 1.35


class Disk:
    """A file system of a given size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, size_kb: int) -> None:
        """Mount it; ``PermissionError`` where that is not allowed."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(self.folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise PermissionError(result.stderr.strip())

    def resize(self, size_kb: int) -> None:
        """Change its size; what is there stays."""
        subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    try:
        disk.mount(PLENTY_KB)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)


def published(folder: Path) -> dict[str, str]:
    """The hash of every file that people and programs read."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != ".stages"
    }


def test_a_full_disk_is_one_line_and_with_more_room_the_same_command_goes_on_to_the_same_bytes(
    small_corpus: Path,
    tmp_path: Path,
    disk: Disk,
    settings_for: Callable[..., DataSettings],
    run_pipeline: Callable[[DataSettings], list[str]],
) -> None:
    with_room = tmp_path / "with_room"
    run_pipeline(settings_for(small_corpus, with_room))
    expected = published(with_room)
    assert {"manifest.json", "report.json", "report.html", "train/shard_00000.bin"} <= expected.keys()

    output = disk.folder / "out"
    settings = settings_for(small_corpus, output)
    stopped_in, size_kb = [], FIRST_KB
    while True:
        disk.resize(int(size_kb))
        try:
            run_pipeline(settings)
            break
        except BadInputError as error:
            line = str(error)
        assert "cannot be written (No space left on device); make room or choose another output" in line
        assert "\n" not in line
        assert str(disk.folder) in line
        stopped_in.append(line.split()[0])
        with pytest.raises(BadInputError, match="not a data set"):
            open_dataset(output)
        assert published(output).items() <= expected.items()
        size_kb *= GROWTH
        assert size_kb < PLENTY_KB, "runs that failed leave so much behind that no room is enough"
    assert {"clean,", "exact", "minhash", "shards"} <= set(stopped_in), stopped_in
    assert published(output) == expected
    open_dataset(output, verify=True)


def test_a_full_disk_ends_the_command_with_its_line_and_status_78(
    small_corpus: Path, tmp_path: Path, disk: Disk, repository_root: Path
) -> None:
    config = tmp_path / "small.json"
    config.write_text(f'{{"name": "small", "output": "{disk.folder}/out", "sources": [{{"path": "{small_corpus}"}}]}}')
    disk.resize(FIRST_KB)
    command = [sys.executable, str(repository_root / "data_pipeline" / "main.py"), "--config", str(config)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 78, result.stderr
    assert result.stderr.count("\n") == 1
    assert "cannot be written (No space left on device)" in result.stderr
