"""The weights of a checkpoint in whatever form it has, without ever holding them: each tensor is a list of runs.

A run is a stretch of a flat tensor in a file that is mapped, not read, so a whole model costs address space only and
whoever copies decides how much is in memory. Three forms are read, all under the plain model's names:

    weights/     safetensors of the plain model: one run a tensor
    engine/      ZeRO-3's fp32 partitions, one file a rank: of each tensor one run a rank that shares it; each rank
                 has its own experts, and an expert's gate and up, apart here, lie one behind the other there
    universal    one file a parameter, fp32 (``checkpoint/universal.py``), from any ZeRO stage

and an exported folder, which is the first with a prefix. Names and shapes are compared with the configuration's, so a
tensor can neither be missing nor be cut short.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launch.files import path_inside
from launch.settings import BadInputError, parse_settings, read_json_object
from model import IceConfig, IceModel
from model.expert_parallel import SELECTION_BIAS, stored_parts
from pretrain.checkpoint.layout import BIASES, ENGINE, WEIGHTS
from pretrain.checkpoint.manifest import find_damage
from pretrain.checkpoint.state import read_record
from pretrain.checkpoint.universal import find_universal
from pretrain.checkpoint.unpickling import load_data
from pretrain.weights import CONFIG, INDEX

PIECE_ELEMENTS = 1 << 22  # 16 MiB of fp32


class Run(NamedTuple):
    """``size`` elements of ``flat`` (one dimension, mapped) from ``start`` on."""

    flat: Tensor
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in files; its runs one after the other are its elements, row by row."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in."""
        return self.runs[0].flat.dtype

    @property
    def elements(self) -> int:
        """How many there are."""
        return prod(self.shape)

    def pieces(self, elements: int = PIECE_ELEMENTS) -> Iterator[Tensor]:
        """All elements in order, flat, at most ``elements`` at a time: views of mapped files."""
        for flat, start, size in self.runs:
            for first in range(start, start + size, elements):
                yield flat[first : min(first + elements, start + size)]

    def copy_to(self, target: Tensor, first_row: int = 0) -> None:
        """Fill ``target`` with the rows (along the first dimension) from ``first_row`` on."""
        self.copy_elements(target, first_row * prod(self.shape[1:]))

    def copy_elements(self, target: Tensor, start: int) -> None:
        """Fill ``target``, of any shape, with the elements from number ``start`` on."""
        flat = target.reshape(-1) if target.is_contiguous() else torch.empty(target.numel(), dtype=target.dtype)
        place = 0
        for run in _cut(self.runs, start, target.numel()):
            flat[place : place + run.size].copy_(run.flat[run.start : run.start + run.size])
            place += run.size
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))


@dataclass(frozen=True)
class WeightSource:
    """All weights of a model, as files. ``path``: what messages call it."""

    path: Path
    config: IceConfig
    tensors: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """What the weights (biases of routers aside, which are always fp32) are stored in."""
        return next(tensor.dtype for name, tensor in self.tensors.items() if not name.endswith(SELECTION_BIAS))

    def for_model(self, config: IceConfig) -> WeightSource:
        """The same weights for another configuration; ``BadInputError`` when names or shapes differ."""
        return _checked(self.path, config, self.tensors)

    def load(self, dtype: torch.dtype = torch.float32) -> IceModel:
        """The plain model on the CPU in evaluation mode; selection biases stay in fp32."""
        with torch.device("meta"):
            model = IceModel(self.config)
        model = model.to(dtype).to_empty(device="cpu")
        if self.config.tie_embeddings:
            model.head.weight = model.embed.weight
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, SELECTION_BIAS):
                    module.register_buffer(SELECTION_BIAS, getattr(module, SELECTION_BIAS).float())
            for name, target in model.state_dict().items():
                if name in self.tensors:  # a tied head has no tensor of its own
                    self.tensors[name].copy_to(target)
        return model.eval()


def open_folder(folder: Path, prefix: str = "", config: IceConfig | None = None) -> WeightSource:
    """The safetensors in ``folder``, whose names begin with ``prefix``; ``config`` or the folder's own.

    With or without an index. Raises ``BadInputError`` when there are none, or not those of the configuration.
    """
    if config is None:
        config = parse_settings(IceConfig, read_json_object(folder / CONFIG), source=str(folder / CONFIG))
    index = folder / INDEX
    if index.is_file():
        where = read_json_object(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise BadInputError(f"{index}: weight_map: must name a file for each tensor")
        files = sorted(set(where.values()))
    else:
        files = ["model.safetensors"]
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            path = path_inside(folder, file)
        except ValueError as error:
            raise BadInputError(f"{index}: {error}") from None
        for name, tensor in _mapped_safetensors(path).items():
            plain = name.removeprefix(prefix)
            if plain in found:
                raise BadInputError(f"{path}: {plain}: is stored twice")
            found[plain] = _whole(plain, tensor)
    return _checked(folder, config, found)


def open_checkpoint(checkpoint: Path, form: str = "auto") -> WeightSource:
    """The weights of a checkpoint that was found to be good.

    Args:
        checkpoint: Its folder.
        form: ``weights`` (the plain model's safetensors), ``sharded`` (ZeRO-3's fp32 partitions), ``universal``; or
            ``auto``, the first of these that is there.

    Raises:
        BadInputError: When there is no such form, or it cannot be read.
    """
    if form == "weights" or (form == "auto" and (checkpoint / WEIGHTS / INDEX).is_file()):
        if not (checkpoint / WEIGHTS / INDEX).is_file():
            raise BadInputError(f"{checkpoint}: has no {WEIGHTS}/ (checkpoint.plain_weights = false); use another form")
        return open_folder(checkpoint / WEIGHTS)
    config = parse_settings(IceConfig, read_record(checkpoint)["identity"]["model"], source=str(checkpoint))
    universal = find_universal(checkpoint)
    stage = read_record(checkpoint)["identity"]["topology"].get("zero_stage")
    if form == "sharded" or (form == "auto" and stage == 3):
        if stage != 3:
            raise BadInputError(
                f"{checkpoint}: was saved with parallel.zero_stage = {stage}; only 3 is sharded weights"
            )
        tensors = _sharded(checkpoint / ENGINE)
    elif universal is not None:
        damage = find_damage(universal)
        if damage is not None:
            raise BadInputError(f"{universal}: {damage}; remove it and make it again with launch/reshape.py")
        tensors = _universal(universal / ENGINE)
    else:
        raise BadInputError(
            f"{checkpoint}: has no weights in one place; make its universal form first: "
            f"python launch/reshape.py --run {checkpoint.parent.parent}"
        )
    biases = {name: _whole(name, bias) for name, bias in _mapped_safetensors(checkpoint / BIASES).items()}
    return _checked(checkpoint, config, {**_shaped(_plain(tensors, checkpoint), config), **biases})


def _mapped_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise BadInputError(f"{path}: no readable safetensors file ({error})") from None


def _whole(name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(name, tuple(tensor.shape), (Run(tensor.reshape(-1), 0, tensor.numel()),))


def _cut(runs: Iterable[Run], start: int, count: int) -> list[Run]:
    """``count`` elements from ``start`` on of ``runs`` taken as one."""
    found, place = [], 0
    for run in runs:
        first, last = max(start, place), min(start + count, place + run.size)
        if first < last:
            found.append(Run(run.flat, run.start + first - place, last - first))
        place += run.size
    return found


def _wanted_shapes(config: IceConfig) -> dict[str, tuple[int, ...]]:
    """What a model of ``config`` consists of; a tied head has no tensor of its own."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in IceModel(config).state_dict().items()}
    if config.tie_embeddings:
        del wanted["head.weight"]
    return wanted


def _shaped(found: Mapping[str, StoredTensor], config: IceConfig) -> dict[str, StoredTensor]:
    """``found`` with the shapes of ``config`` where the universal form has made a tensor flat (from ZeRO-3)."""
    shapes = _wanted_shapes(config)
    return {
        name: StoredTensor(name, shapes[name], tensor.runs)
        if name in shapes and tensor.shape == (prod(shapes[name]),)
        else tensor
        for name, tensor in found.items()
    }


def _checked(path: Path, config: IceConfig, found: Mapping[str, StoredTensor]) -> WeightSource:
    """``found`` in the model's order, once each is known to be what ``config`` asks for."""
    wanted = _wanted_shapes(config)
    if config.tie_embeddings:
        found = {name: tensor for name, tensor in found.items() if name != "head.weight"}
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        raise BadInputError(
            f"{path}: not the weights of its configuration: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for name, shape in wanted.items():
        tensor = found[name]
        if tensor.shape != shape or sum(run.size for run in tensor.runs) != tensor.elements:
            raise BadInputError(f"{path}: {name}: has shape {tensor.shape}, its configuration asks for {shape}")
    return WeightSource(path, config, {name: found[name] for name in wanted})


def _plain(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The engine's names and parts to the plain model's: an expert's gate and up become one matrix."""
    plain = {}
    for name, parts in stored_parts(tensors.keys()).items():
        plain[name] = _joined(name, [_there(tensors, part, path) for part in parts])
    return plain


def _there(tensors: Mapping[str, StoredTensor], name: str, path: Path) -> StoredTensor:
    if name not in tensors:
        raise BadInputError(f"{path}: has no {name}")
    return tensors[name]


def _joined(name: str, tensors: Sequence[StoredTensor]) -> StoredTensor:
    """One tensor of ``tensors``: themselves, or row by row of the first dimension one behind the other."""
    if len(tensors) == 1:
        return StoredTensor(name, tensors[0].shape, tensors[0].runs)
    experts, *rest = tensors[0].shape
    block = prod(rest)
    runs: list[Run] = []
    for expert in range(experts):
        for tensor in tensors:
            runs += _cut(tensor.runs, expert * block, block)
    return StoredTensor(name, (experts, len(tensors) * rest[0], *rest[1:]), tuple(runs))


def _universal(folder: Path) -> dict[str, StoredTensor]:
    """``zero/NAME/fp32.pt`` for each parameter: a tensor, or one with notes."""
    found = {}
    for file in sorted(folder.glob("zero/*/fp32.pt")):
        stored = _load_mapped(file)
        tensor = stored["param"] if isinstance(stored, dict) else stored
        found[file.parent.name] = _whole(file.parent.name, tensor)
    return found


def _load_mapped(path: Path) -> Any:
    try:
        return load_data(path, mapped=True)
    except Exception as error:  # torch's interpreter raises whatever a made-up file leads it to
        raise BadInputError(f"{path}: cannot be read as plain data ({type(error).__name__}: {error})") from None


class _Share(NamedTuple):
    """One rank's part of a parameter."""

    experts: int  # the first expert of the rank; 0 for what is no expert's
    partition: int  # among the ranks that share the same elements
    shape: tuple[int, ...]  # of what is shared
    run: Run


@dataclass(frozen=True)
class _RankFiles:
    """A rank's two files of a ZeRO-3 checkpoint."""

    model: Path
    optimizer: Path

    @cached_property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Of each group, the parameters' shapes in the order in which they lie in the partition."""
        return [{name: tuple(shape) for name, shape in group.items()} for group in self._states["param_shapes"]]

    @cached_property
    def first_experts(self) -> dict[str, int]:
        """Of each expert layer, the number of this rank's first expert."""
        layers = self._states.get("ds_autoep_layers") or []
        found = {}
        for layer in layers:
            placement = layer["expert_placement"]["ranks"][layer["ep_rank"]]["experts"]
            if list(placement) != list(range(layer["global_expert_start"], layer["global_expert_end"])):
                raise BadInputError(f"{self.model}: {layer['module_path']}: experts are not in order")
            found[layer["expert_key_prefix"]] = int(layer["global_expert_start"])
        return found

    @cached_property
    def _states(self) -> dict[str, Any]:
        states: dict[str, Any] = _load_mapped(self.model)
        return states


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    """The fp32 partitions of ZeRO-3, put in order.

    A partition holds of each parameter of its group the rank's ``ceil(elements / ranks)`` elements, padded at the end.
    """
    from pretrain.engine import restrict_unpickling

    restrict_unpickling()
    models = sorted(folder.glob("zero_pp_rank_*_model_states.pt"), key=_rank_of)
    shares: dict[str, list[_Share]] = {}
    for rank, model in enumerate(models):
        files = _RankFiles(model, model.with_name(model.name.replace("model_states", "optim_states")))
        if not files.optimizer.is_file():
            raise BadInputError(f"{files.optimizer}: is missing")
        state = _load_mapped(files.optimizer)["optimizer_state_dict"]
        partitions = state["fp32_flat_groups"]
        notes = state.get("ds_zero_partition_groups") or [{}] * len(partitions)
        for group, (shapes, note, flat) in enumerate(zip(files.shapes, notes, partitions, strict=True)):
            if not torch.is_tensor(flat):
                raise BadInputError(
                    f"{files.optimizer}: group {group}: has no weights (kept on NVMe); make the universal form with "
                    "launch/reshape.py"
                )
            place = 0
            for name, shape in shapes.items():
                ranks, own = note.get("partition_count", len(models)), note.get("partition_rank", rank)
                each = -(-prod(shape) // ranks)
                count = max(0, min(each, prod(shape) - own * each))
                first = files.first_experts.get(name.rpartition(".")[0], 0)
                shares.setdefault(name, []).append(_Share(first, own, shape, Run(flat.reshape(-1), place, count)))
                place += each
    return {name: _assembled(name, found) for name, found in shares.items()}


def _rank_of(path: Path) -> int:
    """The rank in ``zero_pp_rank_12_mp_rank_00_model_states.pt``."""
    return int(path.name.split("_")[3])


def _assembled(name: str, shares: list[_Share]) -> StoredTensor:
    """A parameter from the parts that the ranks hold; its first dimension counts all experts."""
    ordered = sorted(shares, key=lambda share: (share.experts, share.partition))
    rows = [next(same).shape[0] for _, same in groupby(ordered, key=lambda share: share.experts)]
    runs = tuple(share.run for share in ordered if share.run.size)
    return StoredTensor(name, (sum(rows), *shares[0].shape[1:]), runs)
