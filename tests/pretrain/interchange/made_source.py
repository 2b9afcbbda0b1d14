"""Models with random weights as sources of an export."""

from __future__ import annotations

from pathlib import Path

import torch

from model import IceConfig, IceModel
from pretrain.interchange.weight_source import WeightSource, open_folder
from pretrain.weights import weight_files


def made_model(config: IceConfig, seed: int = 0, noise: float = 0.15) -> IceModel:
    """A model whose greedy text varies: every weight is moved by ``noise``, and routers prefer some experts."""
    torch.manual_seed(seed)
    model = IceModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def made_source(model: IceModel, folder: Path) -> WeightSource:
    """``model`` as the plain weights of a checkpoint."""
    folder.mkdir(parents=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    tensors = {**{name: parameter.detach() for name, parameter in model.named_parameters()}, **buffers}
    for name, write in weight_files(model.config, tensors.items(), is_first=True).items():
        with (folder / name).open("wb") as file:
            write(file)
    return open_folder(folder)
