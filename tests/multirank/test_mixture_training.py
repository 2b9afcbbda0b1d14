"""A mixture of two sources, packed whole, masked by document and changed by a curriculum, through the engine.

The sources can be told apart by their tokens, so the mixture is counted in what the model was really given. The run is
also cut in the middle and resumed, which must change no bit, and made by one rank, which must see the same samples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from rank_pool import RankPool

from data_pipeline.dataset.publish import build_manifest, publish
from data_pipeline.dataset.shards import ShardWriter
from data_pipeline.tokenizer.bpe import train_tokenizer
from pretrain import generate
from pretrain.data import source
from pretrain.evaluate import evaluate_run

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(500)]

VOCABULARY, END = 300, 1
LENGTH, BATCH, STEPS = 32, 8, 8
TOKENS_OF = {"low": range(2, 150), "high": range(150, VOCABULARY)}
SAME = ("step", "loss", "lr", "grad_norm", "loops", "tokens", "next_sample", "expert_load_worst_loop")


def write_source(folder: Path, name: str) -> Path:
    """A data set of short documents whose tokens are this source's alone."""
    stage, generator = folder / name / "stage", random.Random(name)
    stage.mkdir(parents=True)
    (stage / "t.model").write_bytes(train_tokenizer(["some words to train on", "and some more of them"], VOCABULARY))
    for split, documents in (("train", 200), ("validation", 10)):
        with ShardWriter(stage / split / "00000.bin", VOCABULARY) as writer:
            for _ in range(documents):
                ids = generator.choices(TOKENS_OF[name], k=generator.randrange(3, 30))
                writer.add([*ids, END], 2 * len(ids), 0)
    (stage / "documents.jsonl.gz").write_bytes(b"")
    (stage / "gzip9.json").write_text("100")
    publish(*build_manifest(name, stage, stage / "t.model", ["text"], "0" * 64), {}, folder / name / "data")
    return folder / name / "data"


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 8 steps; three quarters high from the third on, all high and deeper from the sixth."""
    folder = tmp_path_factory.mktemp("mixture")
    sources = [{"path": str(write_source(folder, name)), "name": name} for name in TOKENS_OF]
    per_step = LENGTH * BATCH
    stages = [
        {"from_tokens": 2 * per_step, "weights": {"low": 1, "high": 3}},
        {"from_tokens": 5 * per_step, "weights": {"high": 1}, "mean_loops": 3},
    ]
    model = {"vocab_size": VOCABULARY, "dim": 32, "max_seq_len": LENGTH, "max_output_tokens": LENGTH}
    model |= {"prelude_layers": 1, "recurrent_layers": 1, "coda_layers": 1, "max_loop_iters": 2, "n_heads": 2}
    model |= {"n_kv_heads": 2, "ffn_dim": 64, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 16}
    data = {"sources": sources, "stages": stages, "packing": "best_fit", "document_mask": True}
    return {
        "run": {"dir": str(folder / "runs"), "seed": 5},
        "model": model,
        "data": {**data, "sequence_length": LENGTH, "global_batch_size": BATCH},
        "optim": {"lr": 0.01},
        "schedule": {"kind": "constant", "steps": STEPS, "warmup_steps": 2},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 3, "expert_parallel_size": 2, "micro_batch_size": 2},
        "checkpoint": {"every": 4},
        "eval": {"every": 100},
        "logging": {"wandb": "disabled", "tensorboard": False, "plot": False},
    }


def changed(values: dict[str, Any], name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of another run."""
    result = deepcopy(values)
    for section, keys in {**sections, "run": {"name": name}}.items():
        result[section] |= keys
    return result


def lines_of(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What a run wrote down of its training steps."""
    path = Path(values["run"]["dir"]) / name / "metrics.jsonl"
    return [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def steps_of(answers: list[Any]) -> list[dict[str, torch.Tensor]]:
    """For each step the whole global batch, in the order of samples, put together from all ranks' batches."""
    assert [status for status, _ in answers] == [0] * len(answers)
    steps = []
    for of_ranks in zip(*(steps for _, steps in answers), strict=True):
        batches = [batch for of_rank in of_ranks for batch in of_rank]
        whole = {key: torch.cat([getattr(b, key) for b in batches]) for key in ("input_ids", "targets", "document_ids")}
        ids = [sample for batch in batches for sample in batch.sample_ids]
        steps.append({**whole, "sample_ids": torch.tensor(ids)})
    return steps


@pytest.fixture(scope="module")
def unbroken(values: dict[str, Any], _pools: Callable[[int], RankPool]) -> list[dict[str, torch.Tensor]]:
    """The steps of the run in one go, on two ranks."""
    return steps_of(_pools(2).run(rank_jobs.train_and_record_batches, values=changed(values, "unbroken")))


def same_steps(steps: list[dict[str, torch.Tensor]], others: list[dict[str, torch.Tensor]]) -> bool:
    return len(steps) == len(others) and all(
        step[key].equal(other[key]) for step, other in zip(steps, others, strict=True) for key in step
    )


def test_each_stage_gives_the_model_its_mixture_and_depth(
    values: dict[str, Any], unbroken: list[dict[str, torch.Tensor]]
) -> None:
    shares = []
    for step in unbroken:
        # Padding and ends are END; of the others all of a row are one source's.
        is_high = [bool((row[row != END] >= 150).all()) for row in step["targets"].clamp_min(END)]
        is_low = [bool((row[row != END] < 150).all()) for row in step["targets"].clamp_min(END)]
        assert [high != low for high, low in zip(is_high, is_low, strict=True)] == [True] * BATCH
        shares.append(sum(is_high))
    assert sum(shares[:2]) == pytest.approx(BATCH, abs=1)
    assert sum(shares[2:5]) == pytest.approx(3 * BATCH * 3 / 4, abs=1)
    assert shares[5:] == [BATCH] * 3
    assert [line["loops"] for line in lines_of(values, "unbroken")] == [2, 2, 2, 2, 2, 3, 3, 3]
    assert [step["sample_ids"].tolist() for step in unbroken] == torch.arange(STEPS * BATCH).view(STEPS, BATCH).tolist()


def test_rows_hold_whole_documents_and_attention_is_told_where_they_end(
    values: dict[str, Any], two_ranks: RankPool, unbroken: list[dict[str, torch.Tensor]]
) -> None:
    for step in unbroken:
        ends = step["targets"] == END
        assert (ends.sum(dim=1) >= 1).all(), "each row has the end of a whole document"
        assert ends.sum() > 1.2 * BATCH, "and many have several"
        assert step["document_ids"].equal(ends.cumsum(dim=1) - ends.long())
    unmasked = changed(values, "unmasked", data={"document_mask": False}, schedule={"steps": 3})
    two_ranks.run(rank_jobs.train_and_record_batches, values=unmasked)
    (first, *_), (masked, *_) = lines_of(values, "unmasked"), lines_of(values, "unbroken")
    assert abs(first["loss"] - masked["loss"]) > 1e-4, "the mask did not reach the model"


def test_cut_in_the_middle_and_resumed_it_is_the_same_run_to_the_bit(
    values: dict[str, Any], two_ranks: RankPool, unbroken: list[dict[str, torch.Tensor]]
) -> None:
    first = changed(values, "cut", schedule={"steps": 4})
    begun = steps_of(two_ranks.run(rank_jobs.train_and_record_batches, values=first))
    resumed = steps_of(two_ranks.run(rank_jobs.train_and_record_batches, values=changed(values, "cut")))
    assert (len(begun), len(resumed)) == (4, 4)
    assert same_steps([*begun, *resumed], unbroken)
    got, wanted = lines_of(values, "cut"), lines_of(values, "unbroken")
    assert [{key: line[key] for key in SAME} for line in got] == [{key: line[key] for key in SAME} for line in wanted]


def test_one_rank_sees_the_same_samples_and_nearly_the_same_losses(
    values: dict[str, Any], pool_of: Callable[[int], RankPool], unbroken: list[dict[str, torch.Tensor]]
) -> None:
    alone = changed(values, "alone", parallel={"expert_parallel_size": 1})
    steps = steps_of(pool_of(1).run(rank_jobs.train_and_record_batches, values=alone))
    assert same_steps(steps, unbroken)
    losses = [[line["loss"] for line in lines_of(values, name)] for name in ("alone", "unbroken")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.usefixtures("unbroken")
def test_every_source_is_evaluated_as_one_process_would(values: dict[str, Any]) -> None:
    run = Path(values["run"]["dir"]) / "unbroken"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    by_source = {name: line[f"validation_bits_per_byte/source/{name}"] for name in TOKENS_OF}
    assert line["validation_bits_per_byte"] == by_source["low"], "data.path is the first source's"
    assert line["validation_bits_per_byte/source/high/text"] == by_source["high"]
    assert by_source["high"] < by_source["low"] - 0.1, "the last steps trained on high alone"
    results = evaluate_run(run, [2]).by_loops
    assert {name: losses.bits_per_byte for name, losses in results[2].by_source.items()} == pytest.approx(
        by_source, rel=1e-4
    )


@pytest.mark.usefixtures("unbroken")
def test_text_comes_out_of_the_run_without_its_data(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_data(path: Path) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(source, "open_dataset", no_data)
    run = Path(values["run"]["dir"]) / "unbroken"
    assert generate.main(["--run", str(run), "--prompt", "some words", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("some words")
