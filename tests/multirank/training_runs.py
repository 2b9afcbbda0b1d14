"""Whole runs of a tiny model through the real command line, for tests and for ``tests/benchmarks/chaos.py``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.dataset.publish import build_manifest, publish
from data_pipeline.dataset.reader import open_dataset
from data_pipeline.dataset.shards import ShardWriter
from data_pipeline.tokenizer.bpe import SentencePieceTokenizer, train_tokenizer

STEPS, EVERY = 20, 5
SAME = (
    *("step", "loss", "lr", "grad_norm", "loops", "tokens", "next_sample", "loop_residual", "expert_load_worst_loop"),
    *("expert_share", "shallow_loss", "depth_margin", "depth_contrast", "depth_head_loss"),
)
SENTENCE = "the river and a mountain have met in winter when letters came from some village by the harbour"
VOCABULARY = 300


def make_dataset(folder: Path, seed: int) -> Path:
    """A data set of random sentences in two domains; returns its folder. 20 steps read its training part twice over."""
    generator = random.Random(seed)
    stage = folder / "stage"
    stage.mkdir(parents=True)
    documents = [" ".join(generator.choices(SENTENCE.split(), k=120)) for _ in range(22)]
    (stage / "t.model").write_bytes(train_tokenizer(documents, VOCABULARY))
    tokenizer = SentencePieceTokenizer.load(stage / "t.model")
    for split, chosen in (("train", documents[:12]), ("validation", documents[12:])):
        with ShardWriter(stage / split / "00000_00000.tokens", VOCABULARY) as writer:
            for number, text in enumerate(chosen):
                writer.add([*tokenizer.encode(text), tokenizer.end_id], len(text.encode()), number % 2)
    (stage / "documents.jsonl.gz").write_bytes(b"")
    (stage / "gzip9.json").write_text("1000")
    manifest, sources = build_manifest("made", stage, stage / "t.model", ["even", "odd"], "0" * 64)
    publish(manifest, sources, {}, folder / "data")
    open_dataset(folder / "data", verify=True)
    return folder / "data"


def write_config(folder: Path, data: Path, name: str, wandb: str = "disabled") -> Path:
    """The configuration of a run in ``folder``: every depth, balancing, recomputation, EP = 2, several ideas."""
    values = {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 11},
        "model": {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "max_seq_len": 32,
            "max_output_tokens": 32,
            "prelude_layers": 1,
            "recurrent_layers": 1,
            "coda_layers": 1,
            "max_loop_iters": 3,
            "n_heads": 2,
            "n_kv_heads": 2,
            "ffn_dim": 64,
            "n_experts": 8,
            "n_experts_per_tok": 2,
            "expert_dim": 16,
            "tie_embeddings": True,
            "initial_state": "random",
            "msrd_scales": [1, 2],
            "lora_rank": 4,
            "aec": True,
            "aec_confidence": 0.3,
            "slu": True,
        },
        "data": {"path": str(data), "sequence_length": 32, "global_batch_size": 16},
        "optim": {"lr": 0.01},
        "schedule": {"steps": STEPS, "warmup_steps": 3},
        "loop": {"distribution": "poisson", "mean_loops": 3, "min_loops": 2, "grad_loops": 2, "cdl": {}},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 3, "expert_parallel_size": 2, "micro_batch_size": 2},
        "checkpoint": {"every": EVERY, "keep_last": 2},
        "eval": {"every": 10, "sequences": 8},
        "logging": {"wandb": wandb, "tensorboard": False, "plot": False, "console_every": 1},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


class Launch:
    """A training command in a session of its own, so that killing it cannot miss a rank or hit anyone else."""

    def __init__(self, root: Path, config: Path, *arguments: str, ranks: int = 2) -> None:
        self.log = config.with_suffix(f".{time.monotonic_ns()}.log")
        launcher = Path(sys.executable).parent / "deepspeed"
        self.port = random.SystemRandom().randrange(20000, 30000)  # runs beside this one use the launcher's default
        command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(self.port), "--log_level", "error"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "pretrain/main.py", "--config", str(config), *arguments],
                cwd=root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ranks(self) -> list[psutil.Process]:
        """The two training processes, in rank order."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [child for child in children if "--local_rank=" in " ".join(child.cmdline())]
        return sorted(
            (rank for rank in ranks if "launcher.launch" not in " ".join(rank.cmdline())),
            key=lambda rank: next(part for part in rank.cmdline() if part.startswith("--local_rank=")),
        )

    def kill(self) -> None:
        """SIGKILL the launcher and all ranks at once."""
        doomed = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in doomed:
            process.kill()
        psutil.wait_procs(doomed, timeout=20)
        self.process.wait()
        self.assert_no_memory_left()

    def end(self, timeout_seconds: float = 150) -> tuple[int, str]:
        """Exit status and output."""
        try:
            status = self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"no end in {timeout_seconds} s:\n{self.log.read_text()[-5000:]}")
        self.assert_no_memory_left()
        return status, self.log.read_text()

    def assert_no_memory_left(self) -> None:
        """DeepSpeed's buffers in /dev/shm are memory: 66 MiB a rank, for ever, if nobody takes them away."""
        assert not list(Path("/dev/shm").glob(f"*_{self.port}_*"))

    def wait_for_file(self, folder: Path, pattern: str, timeout_seconds: float = 240) -> None:
        """Return when ``folder`` holds a file like ``pattern``."""
        deadline = time.monotonic() + timeout_seconds
        while not any(folder.glob(pattern)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no {pattern}:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.001)

    def wait_for_step(self, run: Path, step: int, timeout_seconds: float = 120) -> None:
        """Return when ``metrics.jsonl`` has a line of ``step``."""
        deadline = time.monotonic() + timeout_seconds
        while not any(line["step"] >= step for line in training_lines(run)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"step {step} was not reached:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.01)


def training_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, whole) if "loss" in line]


def evaluation_lines(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "validation_bits_per_byte" in line]


def committed(run: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*/manifest.json"))


def difference_of_runs(run: Path, expected: Path, steps: int) -> str | None:
    """Where ``run`` differs first: a step's numbers, an evaluation, the last weights and biases; None when equal."""
    got, wanted = training_lines(run), training_lines(expected)
    if [line["step"] for line in got] != list(range(1, steps + 1)):
        return f"steps {[line['step'] for line in got]}, not each of 1 to {steps} once"
    for line, other in zip(got, wanted, strict=True):
        for key in SAME:
            if line[key] != other[key]:
                return f"{key} of step {line['step']}: {line[key]!r}, not {other[key]!r}"
    if evaluation_lines(run) != evaluation_lines(expected):
        return "the evaluations"
    last = f"checkpoints/step_{steps:08d}"
    for name in ("biases.safetensors", "weights/model-00000.safetensors"):
        if (run / last / name).read_bytes() != (expected / last / name).read_bytes():
            return f"the bytes of {last}/{name}"
    return None


def assert_same_run(run: Path, expected: Path) -> None:
    """The same numbers in every step and evaluation, the same last weights and biases, byte for byte."""
    assert difference_of_runs(run, expected, STEPS) is None
