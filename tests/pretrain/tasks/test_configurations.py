"""The configuration of each task: valid, of the right sizes, and its batches train a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from answers import right_answer

from launch.settings import load_settings
from model import IceModel
from pretrain.config import TrainingConfig
from pretrain.data import BatchLoader, open_main, open_sampler
from pretrain.evaluate import default_depths
from pretrain.losses import mean_loss
from pretrain.main import main
from pretrain.tasks.dataset import TaskDataset

NAMES = ("copy", "mano", "p_hop", "parity", "sudoku")


def load(root: Path, name: str) -> TrainingConfig:
    return load_settings(TrainingConfig, root / "configs" / "tasks" / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_of_its_task_and_asks_beyond_it(repository_root: Path, name: str) -> None:
    config = load(repository_root, name)
    (source,) = config.data.all_sources
    assert source.task is not None
    assert source.task.kind == source.label == config.run.name == name
    assert config.model.vocab_size == TaskDataset(source.task).vocab_size
    assert config.data.document_mask
    assert source.task.beyond
    assert source.task.longest + 1 <= config.data.sequence_length
    depths = default_depths(config.mean_loops, config.deepest_step)
    assert depths[0] < config.mean_loops < config.deepest_step < depths[-1], "below and beyond training"


@pytest.mark.parametrize("name", NAMES)
def test_its_batches_are_right_and_teach_a_model_the_answers_only(repository_root: Path, name: str) -> None:
    config = load(repository_root, name)
    sampler = open_sampler(config.data, config.run.seed, config.model.vocab_size, open_main(config.data))
    batch = BatchLoader(sampler, 4, 4, with_documents=True).step_batches(0)[0]
    (source,) = config.data.all_sources
    assert source.task is not None
    end = len(source.task.alphabet)
    for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
        text = "".join("|" if token == end else source.task.alphabet[token] for token in [*ids.tolist(), end])
        whole = [problem for problem in text.strip("|").split("|") if problem]
        answers = [right_answer(source.task, problem.split("=")[0] + "=") for problem in whole]
        assert [problem.split("=")[1] for problem in whole] == answers
        wanted = [token for answer in answers for token in [*map(source.task.alphabet.index, answer), end]]
        assert targets[targets != -100].tolist() == wanted

    torch.manual_seed(0)
    model = IceModel(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    losses = []
    for _ in range(6):
        output = model(batch.input_ids, 2, targets=batch.targets, document_ids=batch.document_ids, return_output=True)
        assert (output.token_losses_BS[batch.targets == -100] == 0).all()
        loss = mean_loss(output.token_losses_BS, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_dry_run_of_a_task_says_what_it_would_be(repository_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = repository_root / "configs" / "tasks" / "parity.json"
    assert main(["--config", str(path), "--dry-run", "--ranks", "2"]) == 0
    assert "parity.json: valid" in capsys.readouterr().out
