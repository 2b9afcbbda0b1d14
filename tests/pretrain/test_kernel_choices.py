"""What ``parallel.attention`` and ``parallel.row_moves`` mean on a machine, in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.settings import BadInputError, load_settings
from pretrain import attention_kernel
from pretrain.attention_kernel import AttentionChoice, choose_attention
from pretrain.config import TrainingConfig
from pretrain.row_moves import TritonMoves, choose_moves, fused, torch_moves

TINY = Path(__file__).resolve().parents[2] / "configs" / "ice_tiny.json"


def chosen(*overrides: str, refusals_elsewhere: float = 0.0) -> AttentionChoice:
    config = load_settings(TrainingConfig, TINY, list(overrides))

    def sum_over_ranks(values: list[float]) -> list[float]:
        return [value + refusals_elsewhere for value in values]

    return choose_attention(config, torch.device("cpu"), torch.float32, sum_over_ranks)


def test_without_a_window_or_documents_there_is_nothing_to_choose() -> None:
    choice = chosen("parallel.attention=flex", "data.document_mask=false", "model.sliding_window=100000")
    assert choice == ("sdpa", "scaled_dot_product_attention; nothing but causality hides keys")


@pytest.mark.parametrize(
    ("overrides", "hidden"),
    [
        (["model.sliding_window=8"], "a window of 8"),
        (["model.kv_policy=gated", "model.kv_gate_window=16"], "a window of 16"),
        (["model.sliding_window=8", "data.document_mask=true"], "a window of 8 and documents"),
    ],
)
def test_a_cpu_writes_the_mask_out_and_says_why(overrides: list[str], hidden: str) -> None:
    choice = chosen(*overrides)
    assert choice.kernel == "sdpa"
    assert choice.reason.endswith(
        f"the mask of {hidden} written out (flex_attention: no kernels for both directions on cpu)"
    )
    with pytest.raises(BadInputError, match=r'parallel\.attention = "flex": no kernels for both directions on cpu'):
        chosen(*overrides, "parallel.attention=flex")


def test_flex_runs_where_every_rank_can(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[tuple[int, int]] = []

    def probe(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
        probed.append((head_dim, value_dim))

    monkeypatch.setattr(attention_kernel, "probe", probe)
    assert chosen("model.sliding_window=8").kernel == "flex"
    assert chosen("model.sliding_window=8", "parallel.attention=sdpa").kernel == "sdpa"
    elsewhere = chosen("model.sliding_window=8", refusals_elsewhere=2.0)
    assert elsewhere.kernel == "sdpa"
    assert "2 other ranks cannot use it" in elsewhere.reason
    assert len(probed) == 2


def test_rows_are_moved_by_triton_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_moves("auto", "cpu").moves is torch_moves
    with pytest.raises(BadInputError, match=r'parallel\.row_moves = "triton": cpu has no Triton kernels; use "auto"'):
        choose_moves("triton", "cpu")
    monkeypatch.setattr(fused, "is_available", lambda: True)
    assert isinstance(choose_moves("auto", "cuda").moves, TritonMoves)
    assert choose_moves("torch", "cuda").reason == "torch's indexing: asked for"
    monkeypatch.setattr(fused, "is_available", lambda: False)
    assert "DeepSpeed sees no Triton" in choose_moves("auto", "cuda").reason
