"""``sbatch slurm/data.sh`` on a real Slurm, with a node that loses power on the way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_jobs import local_slurm, submit, wait_for

WORDS = (
    "the of and to that have with river mountain letter evening market captain garden winter question answer "
    "window morning travel reason silver number water service request table history village harbour people"
)


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
    job = submit(
        repository_root,
        tmp_path / "driver.log",
        *("--mem=1G", "--nodelist=node1", "slurm/data.sh", "--config", str(config)),
        ICE_PYTHON=sys.executable,
    )
    try:
        wait_for(lambda: list((tmp_path / "cluster" / ".stages").glob("clean-*.partial/logs/logs/*.log")), 60)
        local_slurm("kill-node", "node2")
        local_slurm("start-node", "node2")
        wait_for(lambda: "ready" in job.text() or "error" in job.text().lower(), 150)
    finally:
        job.cancel()
    assert "ready" in job.text(), job.text()
    assert "clean      goes on after this: clean, piece" in job.text()

    local = [sys.executable, str(repository_root / "data_pipeline" / "main.py"), "--config", str(config)]
    subprocess.run([*local, "--set", f"output={tmp_path / 'local'}"], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "cluster" / "manifest.json").read_bytes() == (tmp_path / "local" / "manifest.json").read_bytes()
