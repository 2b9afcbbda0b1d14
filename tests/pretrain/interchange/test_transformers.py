"""An exported model in a process that has transformers and not this package: the same logits, the same text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_source import made_model, made_source

from data_pipeline.tokenizer.bpe import SentencePieceTokenizer, train_tokenizer
from data_pipeline.tokenizer.self_check import adversarial_texts
from model import IceConfig, IceModel, apex_small, rrslm_1_5m
from pretrain.interchange.hugging_face import ExportRecord, RunTokenizer, write_folder

LINES = [f"The captain of ship {number} wrote </s> to the harbour about {number * 7} barrels." for number in range(200)]
VOCABULARY = 352
LOOPS, DEEPER, NEW = 2, 5, 6
PADDING = torch.tensor([0, 3])


def ice(**fields: Any) -> IceConfig:
    return IceConfig.model_validate(
        IceConfig(**fields).scaled_down().model_dump() | {"vocab_size": VOCABULARY, "dim": 32, "max_seq_len": 32}
    )


CONFIGS = {
    "gqa": ice(qk_norm=True, recurrent_layers=2),
    "tied": ice(tie_embeddings=True, initial_state="learned", moe_n_groups=8, moe_topk_groups=4),
    "mla": ice(attn_type="mla", q_lora_rank=32),
    "moda": ice(attn_type="moda_v2", sandwich_norm=True),
    "msrd_lora_halting": ice(msrd_scales=(1, 2), lora_rank=8, act=True),
    "aec_slu": ice(aec=True, slu=True),
    "windows": ice(sliding_window=16, full_attention_every=2, rope_scaling_factor=2.0, rope_original_seq_len=16),
    "pooled": ice(mlca_window=8, n_experts=0),
    "ring": ice(kv_policy="ring", kv_ring_size=2),
    "gated": ice(kv_policy="gated"),
    "apex": apex_small().scaled_down().model_copy(update={"vocab_size": VOCABULARY}),
    "refine": rrslm_1_5m().scaled_down().model_copy(update={"vocab_size": VOCABULARY}),
    "plain": ice(core="plain"),
}
# The past seen by later tokens is not each loop's own, or is averaged: decoding is then not the plain forward.
OTHER_PAST = {"ring", "pooled"}


@pytest.fixture(scope="module")
def tokenizer() -> RunTokenizer:
    content = train_tokenizer(LINES, VOCABULARY)
    return RunTokenizer(SentencePieceTokenizer(content), ".model", content)


@pytest.fixture(scope="module")
def models() -> dict[str, IceModel]:
    return {name: made_model(config, seed=number) for number, (name, config) in enumerate(CONFIGS.items())}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of one length, and two of which the second is shorter, padded at the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=generator)
    padded = torch.where(torch.arange(9) < PADDING.view(-1, 1), 0, ids)
    return ids, padded


@pytest.fixture(scope="module")
def answers(
    models: dict[str, IceModel], tokenizer: RunTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Everything that the other process says, in one start of it."""
    place = tmp_path_factory.mktemp("elsewhere")
    ids, padded = prompts()
    jobs: dict[str, Any] = {"models": {}}
    for name, model in models.items():
        record = ExportRecord(run=name, step=1, tokens=2, n_loops=LOOPS)
        folder = place / f"{name} out" / "exported.1"  # one name, so that transformers keeps the code it has loaded
        # Without a tokenizer no id ends a text.
        write_folder(folder, made_source(model, place / name), record, None, torch.float32, shard_bytes=100_000)
        jobs["models"][name] = {
            "folder": str(folder),
            "ids": ids,
            "padded": padded,
            "padding": PADDING,
            "loops": DEEPER,
            "new": NEW,
            "beams": name in ("gqa", "mla"),
        }
    assert len(list((place / "gqa out" / "exported.1").glob("model-*-of-*.safetensors"))) > 1
    complete = place / "complete"
    write_folder(complete, made_source(models["refine"], place / "again"), record, tokenizer, torch.float32, 10**9)
    jobs["tokenizer"] = {"folder": str(complete), "texts": adversarial_texts(tokenizer.tokenizer)}
    torch.save(jobs, place / "jobs.pt")
    script = Path(__file__).with_name("elsewhere.py")
    finished = subprocess.run(
        [sys.executable, "-I", str(script), str(place)],
        cwd=place,
        env={**os.environ, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    answers: dict[str, Any] = torch.load(place / "answers.pt", weights_only=True)
    return answers


def test_nothing_of_this_package_is_needed(answers: dict[str, Any]) -> None:
    assert answers["loaded"] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_are_the_models(name: str, models: dict[str, IceModel], answers: Any) -> None:
    ids, padded = prompts()
    model, got = models[name], answers[name]
    assert got["troubles"] == {}
    with torch.no_grad():
        torch.testing.assert_close(got["logits"], model(ids, LOOPS), rtol=0, atol=1e-5)
        expected = model(ids, DEEPER)
    assert not torch.allclose(got["logits"], expected, atol=1e-3), "depth changes nothing here: the test is blind"
    torch.testing.assert_close(got["deeper"], expected, rtol=0, atol=1e-5)
    model.zero_grad()
    logits = model(ids, DEEPER)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["gradient"], model.embed.weight.grad, rtol=1e-3, atol=1e-5)
    alone = model(padded[1:, 3:].flip(1), LOOPS)
    torch.testing.assert_close(got["right_padded"][1:, :6], alone.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_with_the_cache_is_the_models(name: str, models: dict[str, IceModel], answers: Any) -> None:
    ids, padded = prompts()
    model, got = models[name], answers[name]
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0}
    assert torch.equal(got["greedy"], model.generate(ids, n_loops=LOOPS, **options))
    assert torch.equal(got["greedy_deeper"], model.generate(ids, n_loops=DEEPER, **options))
    if name not in OTHER_PAST:
        assert torch.equal(got["uncached"], got["greedy"])
    rows = model.generate([padded[0], padded[1, 3:]], n_loops=LOOPS, **options)
    for row, expected in zip(got["padded"], rows, strict=True):
        assert torch.equal(row[-len(expected) :], expected)
    assert got["greedy"][:, -NEW:].unique().numel() > 2, "the text does not vary: the test is blind"
    if got["beams"] is not None:
        assert torch.equal(got["beams"], got["beams_uncached"])


def test_in_bf16_selection_biases_stay_in_fp32(models: dict[str, IceModel], answers: dict[str, Any]) -> None:
    half = answers["half"]
    assert half["weights"] == {"torch.bfloat16"}
    assert half["biases"] == {"torch.float32"}
    with torch.no_grad():
        expected = models["gqa"](prompts()[0], LOOPS)
    assert (half["logits"] - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_the_tokenizer_gives_the_same_ids_and_text(tokenizer: RunTokenizer, answers: dict[str, Any]) -> None:
    got, texts = answers["tokenizer"], adversarial_texts(tokenizer.tokenizer)
    assert got["fast"]
    assert got["ids"] == tokenizer.tokenizer.encode_batch(texts)
    assert set(got["first"]) == {tokenizer.tokenizer.end_id}
    assert got["texts"] == texts
