"""Plain weights on disk give back the model that wrote them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from launch.settings import BadInputError
from model import IceConfig, IceModel, ice_tiny
from pretrain import weights
from pretrain.weights import INDEX, load_model, safetensors_file, weight_files


def write_weights(folder: Path, config: IceConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    folder.mkdir()
    for name, write in weight_files(config, tensors, is_first=True).items():
        with (folder / name).open("wb") as file:
            write(file)


def small_config(**changes: object) -> IceConfig:
    return IceConfig.model_validate(ice_tiny().scaled_down().model_dump() | changes)


def named_tensors(model: IceModel) -> dict[str, torch.Tensor]:
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {**{name: parameter.detach() for name, parameter in model.named_parameters()}, **buffers}


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_gives_the_same_logits(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 40_000)  # several files
    torch.manual_seed(0)
    model = IceModel(small_config(tie_embeddings=tied)).eval()
    with torch.no_grad():
        model.core.blocks[0].ffn.router.e_score_correction_bias.normal_()
    write_weights(tmp_path / "weights", model.config, named_tensors(model).items())
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path / "weights")
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, 3), model(ids, 3), rtol=0, atol=0)
    assert loaded.config == model.config
    if tied:
        assert loaded.head.weight is loaded.embed.weight


def test_other_ranks_write_nothing_but_take_every_tensor() -> None:
    taken = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("a", "b"):
            taken.append(name)
            yield name, torch.empty(0)

    assert weight_files(small_config(), tensors(), is_first=False) == {}
    assert taken == ["a", "b"]


def test_a_safetensors_file_is_the_librarys_to_the_byte() -> None:
    tensors = {
        "matrix": torch.randn(5, 7).T,  # not contiguous
        "half": torch.randn(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "other_half": torch.randn(2, 1, dtype=torch.float16),
        "wide": torch.randn(2, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }
    written = io.BytesIO()
    safetensors_file(tensors)(written)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    loaded = load(written.getvalue())
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert written.getvalue() == save(contiguous, metadata={"format": "pt"})


def test_missing_weights_and_foreign_files_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no weights"):
        load_model(tmp_path)
    model = IceModel(small_config())
    tensors = named_tensors(model)
    tensors.pop("norm.weight")
    write_weights(tmp_path / "weights", model.config, tensors.items())
    with pytest.raises(BadInputError, match=r"missing \['norm.weight'\]"):
        load_model(tmp_path / "weights")
    index = json.loads((tmp_path / "weights" / INDEX).read_text())
    index["weight_map"]["norm.weight"] = "../elsewhere.safetensors"
    (tmp_path / "weights" / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadInputError, match="leads out of the folder"):
        load_model(tmp_path / "weights")
