"""The folder that other libraries read: what lies in it, how it is written, and how it is read back.

    config.json, generation_config.json      the architecture, the depth, the end token
    model*.safetensors, ...index.json        the weights, in files of a bounded size
    modeling_ice.py, configuration_ice.py,
    ice_*.py                                 the model's source (``modelling_code.py``)
    tokenizer.json, tokenizer_config.json    the tokenizer as a fast one; ice_tokenizer.* is the run's own file
    README.md, LICENSE                       how to use it, and on what terms
    ice_export.json                          what it was made from; size and SHA-256 of every file above

It is written under another name and renamed when it is whole. What is read back must have the recorded hashes.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from data_pipeline.tokenizer.fast_tokenizer import fast_tokenizer, tokenizer_config
from data_pipeline.tokenizer.interface import Tokenizer
from launch.files import as_json, fsync_path, path_inside, sha256_of
from launch.settings import BadInputError, parse_settings, read_json_object
from model import IceConfig
from model.expert_parallel import SELECTION_BIAS
from pretrain.config import Section
from pretrain.interchange.modelling_code import CONFIGURATION, MODELING, modelling_code
from pretrain.interchange.safetensors_stream import SINGLE, Output, WrittenFile, plan_files, weight_index, write_files
from pretrain.interchange.weight_source import WeightSource, open_folder
from pretrain.weights import CONFIG, INDEX

RECORD = "ice_export.json"
TOKENIZER = "ice_tokenizer"
PREFIX = "model."  # of every weight: the attribute of ``IceForCausalLM`` that holds the model
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_LICENSE = Path(__file__).resolve().parent.parent.parent / "LICENSE"


class ExportedFile(Section):
    """A file of the folder."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class ExportedTokenizer(Section):
    """The run's own tokenizer file."""

    file: str
    end_token_id: int = Field(ge=0)
    vocab_size: int = Field(ge=1)


class ExportRecord(Section):
    """``ice_export.json``."""

    format: int = 1
    run: str
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    n_loops: int = Field(ge=1)
    tokenizer: ExportedTokenizer | None = None
    files: dict[str, ExportedFile] = Field(default_factory=dict)


@dataclass(frozen=True)
class RunTokenizer:
    """A run's tokenizer and the file it came in."""

    tokenizer: Tokenizer
    suffix: str
    content: bytes


def write_folder(
    out: Path,
    source: WeightSource,
    record: ExportRecord,
    tokenizer: RunTokenizer | None,
    dtype: torch.dtype,
    shard_bytes: int,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write the folder ``out``; ``advance`` is called with the bytes of weights as they are written.

    Raises ``BadInputError`` when ``out`` is there already, or the tokenizer has no form that transformers reads.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInputError(f"{out}: is there already; name a folder that is not")
    small = _descriptions(source.config, record, tokenizer, dtype)
    making = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    making.mkdir(parents=True)
    try:
        files = plan_files(outputs(source, dtype), shard_bytes)
        if list(files) != [SINGLE]:
            small[INDEX] = as_json(weight_index(files))
        written = write_files(making, files, advance)
        written += [_write_small(making / name, content) for name, content in small.items()]
        if tokenizer is not None:
            file = f"{TOKENIZER}{tokenizer.suffix}"
            written.append(_write_small(making / file, tokenizer.content))
            kept = tokenizer.tokenizer
            own = ExportedTokenizer(file=file, end_token_id=kept.end_id, vocab_size=kept.vocab_size)
            record = record.model_copy(update={"tokenizer": own})
        listed = {file.name: ExportedFile(sha256=file.sha256, bytes=file.bytes) for file in written}
        record = record.model_copy(update={"files": listed})
        _write_small(making / RECORD, as_json(record.model_dump(mode="json")))
        fsync_path(making)
        making.rename(out)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    fsync_path(out.parent)


def outputs(source: WeightSource, dtype: torch.dtype) -> list[Output]:
    """The weights under transformers' names; selection biases keep fp32, whose steps bf16 cannot hold."""
    return [
        Output(f"{PREFIX}{name}", tensor, torch.float32 if name.endswith(SELECTION_BIAS) else dtype)
        for name, tensor in source.tensors.items()
    ]


def _write_small(path: Path, content: bytes) -> WrittenFile:
    path.write_bytes(content)
    fsync_path(path)
    return WrittenFile(path.name, sha256_of(path), len(content))


def _descriptions(
    config: IceConfig, record: ExportRecord, tokenizer: RunTokenizer | None, dtype: torch.dtype
) -> dict[str, bytes]:
    """Every file but the weights, the tokenizer's own, and the record."""
    end = {} if tokenizer is None else {"eos_token_id": tokenizer.tokenizer.end_id}
    ids = {**end, **({"bos_token_id": end["eos_token_id"], "pad_token_id": end["eos_token_id"]} if end else {})}
    values = {
        "model_type": "ice",
        "architectures": ["IceForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.IceConfiguration",
            "AutoModelForCausalLM": f"{MODELING}.IceForCausalLM",
        },
        "architecture": config.model_dump(mode="json"),
        "n_loops": record.n_loops,
        "dtype": DTYPE_NAMES[dtype],
        **ids,
    }
    files = {
        CONFIG: as_json(values),
        "generation_config.json": as_json({"use_cache": True, **ids}),
        "README.md": _card(config, record).encode(),
        "LICENSE": _LICENSE.read_bytes(),
        **{name: source.encode() for name, source in modelling_code().items()},
    }
    if tokenizer is not None:
        files["tokenizer.json"] = json.dumps(fast_tokenizer(tokenizer.tokenizer), ensure_ascii=False).encode()
        files["tokenizer_config.json"] = as_json(tokenizer_config(tokenizer.tokenizer, config.max_seq_len))
    return files


def _card(config: IceConfig, record: ExportRecord) -> str:
    return f"""---
library_name: transformers
license: apache-2.0
---

# {record.run}, step {record.step:,}

A looped (recurrent-depth) language model trained with Ice on {record.tokens:,} tokens. Needs torch, transformers 5 and
pydantic.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
ids = tokenizer("It was", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64, n_loops={record.n_loops})[0], skip_special_tokens=True))
```

`n_loops` is the depth, of `generate` and of `model(...)`: more loops of the same weights; {record.n_loops} without it.
The context is {config.max_seq_len:,} tokens. Batches are padded at the left, as the tokenizer does.
"""


def read_folder(folder: Path) -> tuple[WeightSource, ExportRecord | None]:
    """The weights of an exported folder (or one that transformers saved), and its record if it has one.

    Raises ``BadInputError`` when it is no Ice model, or a file is not what the record says.
    """
    if not (folder / CONFIG).is_file():
        raise BadInputError(f"{folder}: no exported model (no {CONFIG})")
    values = read_json_object(folder / CONFIG)
    if values.get("model_type") != "ice" or not isinstance(values.get("architecture"), dict):
        raise BadInputError(f"{folder / CONFIG}: model_type = {values.get('model_type')!r}: only ice can be imported")
    config = parse_settings(IceConfig, values["architecture"], f"{folder / CONFIG}: architecture")
    record = _read_record(folder)
    if record is not None:
        _require_same_files(folder, record.files)
    return open_folder(folder, PREFIX, config), record


def _read_record(folder: Path) -> ExportRecord | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    return parse_settings(ExportRecord, read_json_object(path), str(path))


def _require_same_files(folder: Path, files: Mapping[str, ExportedFile]) -> None:
    for name, entry in sorted(files.items()):
        try:
            path = path_inside(folder, name)
        except ValueError as error:
            raise BadInputError(f"{folder / RECORD}: files: {error}") from None
        remedy = f"if it was changed on purpose, remove {RECORD}"
        if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
            raise BadInputError(f"{path}: is missing or not what {RECORD} records; {remedy}")


def depth_of(folder: Path, config: IceConfig) -> int:
    """The depth that an exported folder runs at by default."""
    loops: Any = read_json_object(folder / CONFIG).get("n_loops", config.max_loop_iters)
    if not isinstance(loops, int) or loops < 1:
        raise BadInputError(f"{folder / CONFIG}: n_loops = {loops!r}: must be a whole number of at least 1")
    return loops
