"""``sbatch slurm/data.sh`` on a real Slurm of two nodes, with a node that loses power on the way.

local_slurm.sh starts Slurm's own daemons on this machine, one node a namespace. It needs root and four Debian packages;
this test installs nothing, and skips with the command that does.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORDS = (
    "the of and to that have with river mountain letter evening market captain garden winter question answer "
    "window morning travel reason silver number water service request table history village harbour people"
)
CANNOT = ("missing:", "must run as root", "is refused here")
SCRIPT = Path(__file__).with_name("local_slurm.sh")


def local_slurm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes of four CPUs; SLURM_CONF is set while they are up."""
    # Not pytest's folder, which is the user's alone: munge wants its socket where everybody can get at it.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ice-slurm-") as folder:
        Path(folder).chmod(0o755)
        values = {"DIR": folder, "GPUS": "0", "CPUS": "4", "PORT": "17817"}
        for name, value in values.items():
            patch.setenv(f"LOCAL_SLURM_{name}", value)
        started = local_slurm("up")
        if any(reason in started.stderr for reason in CANNOT):
            pytest.skip(f"no Slurm here: {started.stderr.strip()}")
        try:
            assert started.returncode == 0, started.stderr
            patch.setenv("SLURM_CONF", started.stdout.strip().partition("=")[2])
            yield
        finally:
            local_slurm("down")


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.2)


@pytest.mark.slurm
def test_a_job_whose_node_dies_publishes_the_same_bytes(cluster: None, tmp_path: Path, repository_root: Path) -> None:
    (tmp_path / "corpus").mkdir()
    generator = random.Random(1)
    for part in range(4):
        texts = (" ".join(generator.choices(WORDS.split(), k=300)) for _ in range(100))
        lines = "".join(json.dumps({"text": text + "."}) + "\n" for text in texts)
        (tmp_path / "corpus" / f"{part}.jsonl").write_text(lines)
    slurm = {"tasks": 2, "mem_per_cpu_gb": 1, "poll_seconds": 1.0, "time": "10", "arguments": ["--nodelist=node2"]}
    config = tmp_path / "config.json"
    values = {
        "name": "small",
        "output": str(tmp_path / "cluster"),
        "sources": [{"path": str(tmp_path / "corpus")}],
        "inputs": {"piece_bytes": 200_000},
        "execution": {"workers": 1, "slurm": slurm},
        "dedup": {"minhash": False},
        "split": {"validation_fraction": 0.3},
        "tokenizer": {"vocab_size": 320},
    }
    config.write_text(json.dumps(values))
    job = subprocess.run(
        [
            *("sbatch", "--parsable", "--mem=1G", f"--output={tmp_path}/driver.log", "--nodelist=node1"),
            *("slurm/data.sh", "--config", str(config)),
        ],
        cwd=repository_root,
        env={**os.environ, "ICE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    log = tmp_path / "driver.log"

    def text() -> str:
        return log.read_text() if log.exists() else ""

    try:
        wait_for(lambda: list((tmp_path / "cluster" / ".stages").glob("clean-*.partial/logs/logs/*.log")), 60)
        local_slurm("kill-node", "node2")
        local_slurm("start-node", "node2")
        wait_for(lambda: "ready" in text() or "error" in text().lower(), 150)
    finally:
        subprocess.run(["scancel", job], check=False)
    assert "ready" in text(), text()
    assert "clean      goes on after this: clean, piece" in text()

    local = [sys.executable, str(repository_root / "data_pipeline" / "main.py"), "--config", str(config)]
    subprocess.run([*local, "--set", f"output={tmp_path / 'local'}"], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "cluster" / "manifest.json").read_bytes() == (tmp_path / "local" / "manifest.json").read_bytes()
