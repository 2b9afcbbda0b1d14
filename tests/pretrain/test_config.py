"""Every configuration in the repository is valid, and every mistake is one line that names key, value and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.config import DataSettings
from launch.settings import EXIT_BAD_INPUT, BadInputError, load_settings
from pretrain.config import TrainingConfig, check_topology
from pretrain.main import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "ice_tiny.json"
RUNS = sorted((ROOT / "configs").glob("*.json"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_configuration_parses_and_dry_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for expected in ("total", "active a token", "tokens a step", "train_micro_batch_size_per_gpu", "zero_optimization"):
        assert expected in printed


def test_a_dry_run_says_what_fp8_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(TINY), "--dry-run", "--set", "precision.recipe=fp8_blockwise"]) == 0
    assert "FP8 here" in (printed := capsys.readouterr().out)
    assert "fp8_blockwise" in printed


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.json")), ids=lambda path: path.stem)
def test_every_data_configuration_parses(path: Path) -> None:
    load_settings(DataSettings, path)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.learning_rate=1", "optim.learning_rate = 1: unknown key"),
        ("optim.lrr=1", "did you mean lr?"),
        ("optim.lr=fast", 'optim.lr = "fast"'),
        ("optim.lr=0", "greater than 0"),
        ("schedule.warmup_steps=500", "schedule.warmup_steps = 500: must be below steps = 500"),
        ("schedule.decay_steps=5", "only used with kind = warmup_stable_decay"),
        ("loop.min_loops=9", "loop.min_loops = 9: exceeds mean_loops = 4"),
        ("loop.distribution=gauss", "'fixed', 'uniform', 'poisson' or 'lognormal_poisson'"),
        ("model.n_heads=7", "model.dim = 128: must be a multiple of n_heads = 7"),
        ("model.variant=ice_2b", 'model.variant = "ice_2b": unknown; accepted: ice_tiny'),
        ("model.dimm=5", "model.dimm = 5: unknown key; did you mean dim?"),
        ("data.sequence_length=512", "data.sequence_length = 512: exceeds model.max_seq_len = 256"),
        ("parallel.expert_parallel_size=3", "must divide model.n_experts = 8; accepted: 1, 2, 4, 8"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4"),
        ("parallel.zero_stage=2", None),
        ("precision.recipe=fp8", "'bf16', 'fp8_rowwise' or 'fp8_blockwise'"),
        ('precision.fp8_exclude=["head"]', "'feed_forward', 'shared_experts' or 'experts'"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last = 0"),
        ("run.name=../x", "run.name"),
        ("data=3", "data = 3"),
    ],
)
def test_a_mistake_is_named(override: str, told: str | None) -> None:
    if told is None:
        load_settings(TrainingConfig, TINY, [override])
        return
    with pytest.raises(BadInputError) as error:
        load_settings(TrainingConfig, TINY, [override])
    assert told in str(error.value)
    assert str(TINY) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.zero_stage=2", "parallel.zero_init=true"],
        ["parallel.fp8_dispatch=true", "parallel.expert_parallel_size=1"],
        ["parallel.comm_backend=deepep", "parallel.expert_parallel_size=1"],
        ["parallel.comm_backend=deepep", "parallel.fp8_dispatch=true"],
        ["parallel.expert_backend=loop", "precision.recipe=fp8_rowwise"],
        ["parallel.zero_stage=1", "parallel.offload_parameters=cpu"],
        ["parallel.zero_stage=0", "parallel.offload_optimizer=cpu"],
        ["parallel.offload_optimizer=nvme"],
        ["parallel.offload_optimizer=nvme", "parallel.nvme_path=/scratch"],
        ["model.n_experts=0"],
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str]) -> None:
    with pytest.raises(BadInputError, match="parallel"):
        load_settings(TrainingConfig, TINY, overrides)


def test_topology_must_fit_expert_parallelism_and_batch() -> None:
    config = load_settings(TrainingConfig, TINY)
    check_topology(config, 2, "x.json")
    with pytest.raises(BadInputError, match=r"x\.json: parallel\.expert_parallel_size = 2: must divide .* ranks, 3"):
        check_topology(config, 3, "x.json")
    with pytest.raises(BadInputError, match=r"data\.global_batch_size = 8: must be a multiple of .* 4 x 4 = 16"):
        check_topology(config, 4, "x.json")


def test_resolved_configuration_reads_back_as_itself() -> None:
    config = load_settings(TrainingConfig, TINY)
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim.lrr=1"], "optim.lrr"),
        (["parallel.expert_parallel_size=1", "data.path=/nowhere"], "/nowhere"),
        ([], "parallel.expert_parallel_size = 2: must divide the number of ranks, 1"),
    ],
)
def test_the_command_ends_in_one_line_and_status_78(overrides: list[str], told: str) -> None:
    command = [sys.executable, "pretrain/main.py", "--config", str(TINY)]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_dry_run_plans_the_decoding_cache_of_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / "configs" / "ice_1b.json"), "--dry-run"]) == 0
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.count("│") == 5}
    # ice_1b: 4 + 16 + 8 + 4 slots of 2 x 4 heads x 128 numbers of 2 bytes; a ring of 2 has 4 + 2 + 2 + 2.
    assert "64.0 KiB" in lines["per_loop"]
    assert "256.0 MiB" in lines["per_loop"]
    assert "20.0 KiB" in lines["ring of 2"]
    assert "14.0 KiB" in lines["last"]


def test_dry_run_for_ranks_that_do_not_fit_is_refused() -> None:
    with pytest.raises(BadInputError, match="must divide the number of ranks, 3"):
        main(["--config", str(TINY), "--dry-run", "--ranks", "3"])
