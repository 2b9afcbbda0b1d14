"""Training that starts from weights there are, instead of drawing them: ``run.init_from``.

Everything about the optimizer, the schedule and the data is new. Each rank takes its own experts out of the files; what
all ranks share is read by the first one and spread, a parameter at a time, so no rank ever holds the model. Weights are
rounded to the precision of the run before the optimizer's fp32 copies are made of them, as drawn ones are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.settings import BadInputError, read_json_object
from model import IceConfig, IceModel
from model.expert_parallel import DOWN_PROJ, EXPERTS, GATE_UP_PROJ, routed_layers
from pretrain.checkpoint import MANIFEST, newest_valid_checkpoint
from pretrain.checkpoint.manifest import find_damage
from pretrain.interchange.hugging_face import read_folder
from pretrain.interchange.weight_source import StoredTensor, WeightSource, open_checkpoint
from pretrain.weights import CONFIG

Gather = Callable[[Tensor], AbstractContextManager[Any]]


def open_initial(path: Path, config: IceConfig) -> WeightSource:
    """The weights in ``path``: a run directory, one of its checkpoints, or an exported folder.

    Raises ``BadInputError`` when there are none, or they are not those of ``config``: every tensor must have the same
    name and shape; what is no shape (depth, thresholds) may differ.
    """
    if (path / MANIFEST).is_file():
        damage = find_damage(path)
        if damage is not None:
            raise BadInputError(f"run.init_from = {path}: {damage}")
        source = open_checkpoint(path)
    elif (path / "checkpoints").is_dir():
        source = open_checkpoint(newest_valid_checkpoint(path / "checkpoints"))
    elif (path / CONFIG).is_file() and "architecture" in read_json_object(path / CONFIG):
        source, _ = read_folder(path)
    else:
        raise BadInputError(f"run.init_from = {path}: is no run directory, checkpoint or exported folder")
    return source.for_model(config)


def fill_model(model: IceModel, source: WeightSource, gathered: Gather, reads: bool) -> None:
    """Fill a model being built, whose experts are still shapes; every rank calls this.

    Args:
        model: As :func:`model.init.experts_without_memory` builds it.
        source: Weights of its shapes.
        gathered: Makes one parameter whole inside, and spreads the first rank's values afterwards.
        reads: Whether this rank writes values into the parameters it is given.
    """
    for layer in routed_layers(model):
        experts: Any = getattr(layer.module, EXPERTS)
        prefix = f"{layer.name}.{EXPERTS}"
        experts.draws = StoredExperts(
            source.tensors[f"{prefix}.{GATE_UP_PROJ}"], source.tensors[f"{prefix}.{DOWN_PROJ}"]
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        with gathered(parameter):
            if reads:
                source.tensors[name].copy_to(parameter.data)


def fill_biases(biases: dict[str, Tensor], source: WeightSource) -> None:
    """Fill the selection biases, by their plain names."""
    for name, bias in biases.items():
        source.tensors[name].copy_to(bias)


@dataclass(frozen=True)
class StoredExperts:
    """A layer's experts in files, where :class:`~model.init.ExpertDraws` would draw them."""

    gate_up: StoredTensor
    down: StoredTensor

    @torch.no_grad()
    def fill(self, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, first_expert: int = 0) -> None:
        """Fill the matrices of the experts from ``first_expert`` on."""
        self.down.copy_to(down_EDF, first_expert)
        size = prod(gate_EFD.shape[1:])
        for number, (gate_FD, up_FD) in enumerate(zip(gate_EFD, up_EFD, strict=True), start=first_expert):
            self.gate_up.copy_elements(gate_FD, 2 * number * size)
            self.gate_up.copy_elements(up_FD, (2 * number + 1) * size)
