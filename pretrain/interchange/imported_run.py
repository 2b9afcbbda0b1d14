"""An exported folder as a run directory: weights, tokenizer and configuration, and nothing of an optimizer.

    NEW/config.json                            the given settings with the folder's architecture
    NEW/checkpoints/step_.../weights, state.json, manifest.json
    NEW/tokenizer/

Such a run generates, is evaluated and is exported like any other. It cannot be resumed, since there is nothing to go on
from; another run starts from its weights.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer.interface import load_tokenizer
from launch.files import as_json, fsync_path, path_inside, sha256_of, write_json_atomically
from launch.settings import BadInputError, apply_overrides, parse_settings, read_json_object
from model import IceConfig
from model.precision import DTYPES
from pretrain.checkpoint import STATE, WEIGHTS, RunIdentity, TrainingState, step_folder_name
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.manifest import write_manifest
from pretrain.checkpoint.state import encode_state
from pretrain.config import TrainingConfig
from pretrain.interchange.hugging_face import ExportRecord, depth_of, outputs, read_folder
from pretrain.interchange.safetensors_stream import Output, plan_files, weight_index, write_files
from pretrain.interchange.weight_source import WeightSource
from pretrain.run_tokenizer import DESCRIPTION_NAME, KeptTokenizer
from pretrain.run_tokenizer import FOLDER as TOKENIZER_FOLDER
from pretrain.weights import CONFIG, INDEX, MAX_FILE_BYTES


def import_folder(folder: Path, run: Path, config_file: Path | None, overrides: Sequence[str] = ()) -> Path:
    """Make the run directory ``run``, which must not exist, of the exported ``folder``; its checkpoint.

    Args:
        folder: What ``pretrain/export.py`` or transformers wrote.
        run: The new run directory.
        config_file: Settings of the run; its ``model`` is replaced. None: defaults, and data where there may be none.
        overrides: As for ``--set``.

    Raises:
        BadInputError: For a folder that is no whole export, a run that exists, or settings that cannot be.
    """
    if run.exists():
        raise BadInputError(f"{run}: is there already; name a new run directory")
    source, record = read_folder(folder)
    config = _run_config(folder, run, source.config, config_file, overrides)
    making = run.with_name(f".{run.name}.{secrets.token_hex(4)}.partial")
    making.mkdir(parents=True)
    try:
        step = 0 if record is None else record.step
        _write_checkpoint(making / "checkpoints" / step_folder_name(step), source, record, step)
        _write_tokenizer(making / TOKENIZER_FOLDER, folder, record)
        write_json_atomically(making / CONFIG, config.model_dump(mode="json"))
        making.rename(run)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    fsync_path(run.parent)
    return run / "checkpoints" / step_folder_name(step)


def _run_config(
    folder: Path, run: Path, model: IceConfig, config_file: Path | None, overrides: Sequence[str]
) -> TrainingConfig:
    loops = depth_of(folder, model)
    values: dict[str, Any]
    if config_file is None:
        values = {"data": {"path": f"data/{run.name}", "sequence_length": min(1024, model.max_seq_len)}}
        values["loop"] = {"mean_loops": loops}
    else:
        values = read_json_object(config_file)
    apply_overrides(values, overrides)
    values["model"] = model.model_dump(mode="json")
    section = values.setdefault("run", {})
    section |= {"name": run.name, "dir": str(run.parent)}
    return parse_settings(TrainingConfig, values, str(config_file or folder))


def _write_checkpoint(checkpoint: Path, source: WeightSource, record: ExportRecord | None, step: int) -> None:
    weights = checkpoint / WEIGHTS
    weights.mkdir(parents=True)
    named = [
        Output(output.name.removeprefix("model."), output.tensor, output.dtype)
        for output in outputs(source, source.dtype)
    ]
    files = plan_files(named, MAX_FILE_BYTES)
    entries = {f"{WEIGHTS}/{file.name}": FileEntry(file.sha256, file.bytes) for file in write_files(weights, files)}
    dtype = next(name for name, each in DTYPES.items() if each == source.dtype)
    identity = RunIdentity(source.config.model_dump(mode="json"), {}, {"dtype": dtype, "imported": True})
    state = TrainingState(step, next_sample=0, tokens=0 if record is None else record.tokens, wandb_id=None)
    small = {
        f"{WEIGHTS}/{CONFIG}": as_json(source.config.model_dump(mode="json")),
        f"{WEIGHTS}/{INDEX}": as_json(weight_index(files)),
        STATE: encode_state(state, identity),
    }
    for name, content in small.items():
        path = checkpoint / name
        path.write_bytes(content)
        fsync_path(path)
        entries[name] = FileEntry(sha256_of(path), len(content))
    write_manifest(checkpoint, entries)


def _write_tokenizer(target: Path, folder: Path, record: ExportRecord | None) -> None:
    """The run's own tokenizer where the export has it, else ``tokenizer.json``; nothing where there is neither."""
    if record is not None and record.tokenizer is not None:
        try:
            path = path_inside(folder, record.tokenizer.file)
        except ValueError as error:
            raise BadInputError(f"{folder}: tokenizer: {error}") from None
        end: int | str = record.tokenizer.end_token_id
    elif (folder / "tokenizer.json").is_file():
        path, end = folder / "tokenizer.json", _end_token(folder)
    else:
        return
    tokenizer = load_tokenizer(path, end)
    target.mkdir()
    kept = KeptTokenizer(
        file=f"tokenizer{path.suffix}",
        sha256=sha256_of(path),
        end_token_id=tokenizer.end_id,
        vocab_size=tokenizer.vocab_size,
    )
    shutil.copyfile(path, target / kept.file)
    write_json_atomically(target / DESCRIPTION_NAME, kept.model_dump())


def _end_token(folder: Path) -> str:
    """The spelling of the token that ends a text."""
    try:
        end = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInputError(f"{folder / 'tokenizer_config.json'}: names no eos_token ({error})") from None
    return str(end["content"] if isinstance(end, dict) else end)
