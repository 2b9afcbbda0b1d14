"""Weights in files: found whole, copied in parts, refused when they are not those of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_source import made_model, made_source
from safetensors.torch import load_file, save_file

from launch.settings import BadInputError
from model import IceConfig
from model.expert_parallel import stored_parts, to_plain_names
from pretrain.interchange.initial_weights import StoredExperts
from pretrain.interchange.safetensors_stream import Output, plan_files, weight_index, write_files
from pretrain.interchange.weight_source import Run, StoredTensor, open_folder
from pretrain.weights import INDEX


def stored(tensor: torch.Tensor, cuts: list[int]) -> StoredTensor:
    """``tensor`` in runs that end at ``cuts``, each somewhere in a larger file."""
    flat, runs, start = tensor.reshape(-1), [], 0
    for end in [*sorted(cuts), len(flat)]:
        file = torch.cat((torch.full((3,), -1.0), flat[start:end], torch.full((2,), -1.0)))
        runs.append(Run(file, 3, end - start))
        start = end
    return StoredTensor("x", tuple(tensor.shape), tuple(runs))


@given(st.lists(st.integers(0, 60), max_size=5), st.integers(1, 9), st.integers(0, 4))
def test_runs_are_the_tensor_whole_and_in_parts(cuts: list[int], piece: int, first: int) -> None:
    tensor = torch.arange(60.0).view(5, 4, 3)
    found = stored(tensor, cuts)
    pieces = list(found.pieces(piece))
    assert torch.equal(torch.cat(pieces), tensor.reshape(-1))
    assert max(map(len, pieces)) <= piece
    rows = torch.empty(5 - first, 4, 3)
    found.copy_to(rows, first)
    assert torch.equal(rows, tensor[first:])
    across = torch.empty(3, 4).t()
    found.copy_elements(across, 12 * first)
    assert torch.equal(across, tensor[first])


def test_ranks_take_their_experts_out_of_whole_matrices() -> None:
    gate_up, down = torch.randn(6, 8, 5), torch.randn(6, 5, 4)
    experts = StoredExperts(stored(gate_up, [7, 100]), stored(down, [31]))
    gate, up, own_down = torch.empty(2, 4, 5), torch.empty(2, 4, 5), torch.empty(2, 5, 4)
    experts.fill(gate, up, own_down, first_expert=3)
    assert torch.equal(torch.cat((gate, up), dim=1), gate_up[3:5])
    assert torch.equal(own_down, down[3:5])


def test_parts_are_named_as_the_engine_gathers_them() -> None:
    names = ["embed.weight", *(f"core.blocks.0.ffn.experts.{w}" for w in ("w1", "w2", "w3"))]
    names.append("core.blocks.0.ffn.router.gate.weight")
    whole = dict(to_plain_names((name, torch.full((2, 1, 1), float(number))) for number, name in enumerate(names)))
    parts = stored_parts(names)
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        assert [float(names.index(part)) for part in parts[name]] == tensor[0].flatten().tolist()


def test_files_are_written_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a piece is ever converted at once, whatever a tensor's size."""
    tensors = [torch.randn(300, 200), torch.randn(7), torch.randn(100, 100)]
    outputs = [
        Output(f"t{number}", stored(tensor, [5000, 60000] if number == 0 else []), dtype)
        for number, (tensor, dtype) in enumerate(
            zip(tensors, (torch.bfloat16, torch.float32, torch.float32), strict=True)
        )
    ]
    whole_pieces, largest = StoredTensor.pieces, 0

    def small_pieces(self: StoredTensor, elements: int = 1000) -> Any:
        nonlocal largest
        for piece in whole_pieces(self, elements):
            largest = max(largest, len(piece))
            yield piece

    monkeypatch.setattr(StoredTensor, "pieces", small_pieces)
    counted: list[int] = []
    files = plan_files(outputs, shard_bytes=125_000)
    assert [[output.name for output in group] for group in files.values()] == [["t0", "t1"], ["t2"]]
    assert list(files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    written = write_files(tmp_path, files, counted.append)
    assert largest == 1000
    assert sum(counted) == sum(output.nbytes for output in outputs) == weight_index(files)["metadata"]["total_size"]
    read = {name: tensor for file in written for name, tensor in load_file(tmp_path / file.name).items()}
    for output, tensor in zip(outputs, tensors, strict=True):
        assert torch.equal(read[output.name], tensor.to(output.dtype))
    assert [file.bytes for file in written] == [(tmp_path / file.name).stat().st_size for file in written]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made_source(made_model(IceConfig(tie_embeddings=True).scaled_down()), tmp_path / "weights")
    return tmp_path / "weights"


def test_a_model_loaded_in_another_precision_keeps_its_biases(folder: Path) -> None:
    source = open_folder(folder)
    model = source.load(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert model.head.weight is model.embed.weight
    deeper = IceConfig.model_validate(source.config.model_dump() | {"max_loop_iters": 9})
    assert source.for_model(deeper).config.max_loop_iters == 9
    wider = IceConfig.model_validate(source.config.model_dump() | {"ffn_dim": 64})
    with pytest.raises(BadInputError, match=r"ffn.gate_up_proj.weight: has shape \(256, 64\), .* asks for \(128, 64\)"):
        source.for_model(wider)


def test_weights_that_are_missing_or_of_another_shape_are_refused(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "norm.weight"}, file)
    with pytest.raises(BadInputError, match=r"missing \['norm.weight'\]"):
        open_folder(folder)
    save_file(tensors | {"other": torch.zeros(1)}, file)
    with pytest.raises(BadInputError, match=r"unexpected \['other'\]"):
        open_folder(folder)
    save_file(tensors | {"norm.weight": torch.zeros(3)}, file)
    with pytest.raises(BadInputError, match=r"norm.weight: has shape \(3,\)"):
        open_folder(folder)
    file.write_bytes(b"\x10\0\0\0\0\0\0\0 no header     ")
    with pytest.raises(BadInputError, match="no readable safetensors file"):
        open_folder(folder)


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.rename(folder.parent / file.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": f"../{file.name}"}}))
    with pytest.raises(BadInputError, match="does not name anything inside"):
        open_folder(folder)
