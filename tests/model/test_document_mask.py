"""Packed rows: with ``document_ids`` each document gets what it would alone, in every attention and idea."""

from __future__ import annotations

import pytest
import torch
from amplified import amplified

from model import IceConfig, IceModel
from model.attention import Cache
from model.attention.causal import Memory, attention_mask

STRUCTURES = {
    "gqa": IceConfig(recurrent_layers=2, qk_norm=True).scaled_down(),
    "mla": IceConfig(attn_type="mla").scaled_down(),
    "moda_v2": IceConfig(attn_type="moda_v2").scaled_down(),
    "window": IceConfig(sliding_window=8, full_attention_every=2).scaled_down(),
    "gated_msrd": IceConfig(kv_policy="gated", msrd_scales=(1, 2)).scaled_down(),
    "yarn": IceConfig(rope_scaling_factor=4.0, rope_original_seq_len=16).scaled_down(),
}
LENGTHS = (5, 11, 1, 13)


def lively(config: IceConfig) -> IceModel:
    """Updates so large that a token of another document would show."""
    torch.manual_seed(5)
    return amplified(config, logits=True).eval()


def packed(config: IceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of the same four lengths, and their document ids; the second row repeats an id that is not adjacent."""
    ids = torch.randint(0, config.vocab_size, (2, sum(LENGTHS)))
    lengths = torch.tensor(LENGTHS)
    rows = [torch.arange(len(LENGTHS)), torch.tensor([7, 3, 9, 1])]
    return ids, torch.stack([row.repeat_interleave(lengths) for row in rows])


@pytest.mark.parametrize("remat", ["none", "loop"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_documents_equal_each_alone_in_values_and_gradients(structure: str, remat: str) -> None:
    config = STRUCTURES[structure]
    model = lively(config)
    model.set_remat(remat)
    ids, document_ids = packed(config)
    together = model(ids, 3, document_ids=document_ids)
    alone = torch.cat([model(part, 3) for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=3e-5, rtol=1e-4)
    assert (model(ids, 3) - alone).abs().max() > 0.1  # without the mask the documents do see each other

    weights = torch.randn_like(together)
    parameters = list(model.parameters())
    expected = torch.autograd.grad((alone * weights).sum(), parameters, allow_unused=True)
    gradients = torch.autograd.grad((together * weights).sum(), parameters, allow_unused=True)
    for got, wanted in zip(gradients, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-6, rtol=1e-3)


def test_the_mask_is_the_definition() -> None:
    document_ids = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 4, 2]])
    memory = Memory((torch.zeros(2, 1, 5, 4),))
    for window in (None, 2):
        mask = attention_mask(5, memory, window, document_ids_BS=document_ids)
        assert mask is not None
        for row in range(2):
            for query in range(5):
                for key in range(5):
                    near = window is None or query - key < window
                    sees = key <= query and near and bool(document_ids[row, query] == document_ids[row, key])
                    assert bool(mask[row, 0, query, key] == 0.0) == sees


def test_one_document_a_row_is_no_mask_at_all() -> None:
    model = lively(STRUCTURES["gqa"])
    ids, _ = packed(model.config)
    torch.testing.assert_close(model(ids, 2, document_ids=torch.zeros_like(ids)), model(ids, 2), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    model = lively(STRUCTURES["gqa"])
    ids, document_ids = packed(model.config)
    with pytest.raises(ValueError, match=r"document_ids of shape \(2, 29\): must be that of input_ids, \(2, 30\)"):
        model(ids, 2, document_ids=document_ids[:, 1:])
    with torch.no_grad(), pytest.raises(ValueError, match="document_ids: packed rows are not decoded"):
        model(ids, 2, document_ids=document_ids, cache=Cache())
