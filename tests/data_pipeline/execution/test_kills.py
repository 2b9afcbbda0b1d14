"""Killed anywhere and started again, with other numbers of workers: the published bytes are the same.

One output folder, and a chain of runs on it, each killed (SIGKILL of its whole process group) a little later than the
one before, in every stage and between the operations of publishing, until one comes through.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataSettings
from data_pipeline.dataset.reader import open_dataset
from launch.settings import BadInputError

KILLED = -9
PUBLISHING_MOMENTS = 10


class Runs:
    """A process that forks runs."""

    def __init__(self, root: Path) -> None:
        program = Path(__file__).with_name("killed_runs.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self.process = subprocess.Popen([sys.executable, str(program)], cwd=root, env=environment, text=True, **pipes)

    def run(self, settings: DataSettings, kill: tuple[str, int] | None = None, events: Path | None = None) -> int:
        """The status of one run."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"settings": settings.model_dump(), "kill": kill, "events": events and str(events)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def runs(repository_root: Path) -> Iterator[Runs]:
    forker = Runs(repository_root)
    yield forker
    forker.process.communicate()


def published(folder: Path) -> dict[str, str]:
    """Every published file's hash; of the report, what does not tell the time.

    Left out are ``.*.tmp``, which a run was about to rename when it was killed: no reader opens them.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != ".stages" and not name.match(".*.tmp"):
            content = path.read_bytes()
            if name.name == "report.json":
                content = json.dumps(without_times(json.loads(content)), sort_keys=True).encode()
            found[str(name)] = hashlib.sha256(content).hexdigest()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if "seconds" not in key}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def moments(events: list[str]) -> list[tuple[str, int, int]]:
    """When to kill, in order, and how many workers that run has.

    In each stage early, in the middle and when its record is to be renamed into place; in two of them also as soon as
    the second of two workers' pieces is finished; and before operations of publishing: evenly chosen ones, and each
    on the manifest.
    """
    in_stages = [name.split("/")[2] for name in events if name.startswith("/.stages/")]
    stages = Counter(name.split("-")[0] for name in in_stages if "-" in name)
    plan = []
    for stage, count in stages.items():  # in order of appearance
        folder = f"/.stages/{stage}-"
        plan.append((folder, 2, 1))
        if stage in ("clean", "minhash"):
            plan.append((f".stages/{stage}-*.partial/**/pieces/00001.json", 0, 2))
        plan += [(folder, max(count // 3, 2), 1), ("/DONE.json", 1, 1)]
    publishing = Counter(
        re.sub(r"[0-9a-f]{8,}\.tmp$", "", name)  # random names: the next run has others
        for name in events
        if name.startswith("/") and not name.startswith("/.stages")
    )
    operations = [(name, number, 1) for name, count in publishing.items() for number in range(1, count + 1)]
    every = -(-len(operations) // PUBLISHING_MOMENTS)
    return plan + [
        moment for index, moment in enumerate(operations) if index % every == 0 or "/manifest.json" in moment[0]
    ]


def test_killed_at_every_stage_and_while_publishing_the_bytes_are_the_same(
    runs: Runs,
    tmp_path: Path,
    small_documents: list[dict[str, Any]],
    corpus_writer: Callable[..., None],
    settings_for: Callable[..., DataSettings],
) -> None:
    corpus_writer(tmp_path / "corpus", [*small_documents[:50], *small_documents[200:]], files=4)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    events = tmp_path / "events"
    assert runs.run(settings_for(tmp_path / "corpus", undisturbed), events=events) == 0
    plan = moments(events.read_text().split("\n"))
    assert {"clean", "exact", "minhash", "split", "tokenizer", "shards"} <= {
        place.split("/")[2].rstrip("-") for place, *_ in plan if place.startswith("/.stages/")
    }
    assert ("/manifest.json", 1, 1) in plan

    survived = []
    for place, number, workers in plan:
        settings = settings_for(tmp_path / "corpus", disturbed, execution={"workers": workers})
        if runs.run(settings, (place, number)) != KILLED:
            survived.append((place, number))
        if (disturbed / "manifest.json").exists():  # published whole, or not at all
            assert published(disturbed).items() >= published(undisturbed).items()
        else:
            with pytest.raises(BadInputError):
                open_dataset(disturbed)
    assert not survived, survived
    assert runs.run(settings_for(tmp_path / "corpus", disturbed, execution={"workers": 3})) == 0
    assert published(disturbed) == published(undisturbed)
    leftovers = [path.name for path in (disturbed / ".stages").iterdir() if ".partial" in path.name]
    assert not leftovers
