"""A run's model for other libraries, and back: ``python pretrain/export.py --run runs/ice_tiny --out exported/tiny``.

The folder is what ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`` and
``AutoTokenizer.from_pretrained(path)`` load, without this package. Any checkpoint will do, with plain weights or
without, and none is ever in memory whole; docs/interchange.md has the formats.

``--import FOLDER --run NEW`` makes such a folder a run directory that generates, is evaluated and is exported, and
whose weights another run starts from (``run.init_from``).
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from launch.environment import name_accelerator
from launch.settings import EXIT_FINISHED, BadInputError, exit_with_status, load_settings, read_json_object, render_text
from model.precision import DTYPES
from pretrain.checkpoint import WEIGHTS, find_damage, newest_valid_checkpoint, step_folder_name
from pretrain.checkpoint.state import read_record
from pretrain.config import TrainingConfig
from pretrain.data import open_main
from pretrain.interchange.hugging_face import ExportRecord, RunTokenizer, outputs, write_folder
from pretrain.interchange.imported_run import import_folder
from pretrain.interchange.weight_source import WeightSource, open_checkpoint
from pretrain.run_tokenizer import DESCRIPTION_NAME, load_kept_tokenizer
from pretrain.run_tokenizer import FOLDER as TOKENIZER_FOLDER
from pretrain.weights import INDEX

FORMS = ("auto", "weights", "sharded", "universal")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export a run's model as a Hugging Face folder, or import one.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory; with --import a new one")
    exporting = parser.add_argument_group("export")
    exporting.add_argument("--out", type=Path, metavar="DIR", help="the folder to write")
    exporting.add_argument("--step", type=int, help="which checkpoint; default the newest intact one")
    exporting.add_argument("--loops", type=int, help="depth of calls that name none; default the trained mean")
    exporting.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights; auto is what the run trained in"
    )
    exporting.add_argument("--shard-size", default="5GB", metavar="SIZE", help="most bytes of a file; default 5GB")
    exporting.add_argument(
        "--form", choices=FORMS, default="auto", help="which form of the checkpoint is read; auto takes what is there"
    )
    exporting.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    importing = parser.add_argument_group("import")
    importing.add_argument("--import", type=Path, metavar="DIR", dest="folder", help="an exported folder")
    importing.add_argument("--config", type=Path, metavar="FILE", help="the new run's settings, but for the model")
    importing.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_arguments(arguments)
    if (options.folder is None) == (options.out is None):
        raise BadInputError("name --out DIR to export the run, or --import DIR to make the run from an exported folder")
    name_accelerator()
    try:
        if options.folder is not None:
            checkpoint = import_folder(options.folder, options.run, options.config, options.overrides)
            print(
                f"{checkpoint}: the weights of {options.folder}; another run starts from them with "
                f"--set run.init_from={options.run}"
            )
        else:
            export_run(options)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        raise BadInputError(f"{error.filename or options.out or options.run}: {error.strerror}") from None
    return EXIT_FINISHED


def export_run(options: argparse.Namespace) -> None:
    """Write ``options.out`` from ``options.run``; errors as ``BadInputError``."""
    run: Path = options.run
    shard_bytes = parse_size(options.shard_size)
    if options.loops is not None and options.loops < 1:
        raise BadInputError(f"--loops {options.loops}: must be at least 1")
    if not (run / "config.json").is_file():
        raise BadInputError(f"{run}: not a run directory (no config.json); train first, or name another with --run")
    config = load_settings(TrainingConfig, run / "config.json")
    checkpoint = _checkpoint(run, options.step)
    dtype, source = _source(checkpoint, options.form, options.dtype)
    state = read_record(checkpoint)
    record = ExportRecord(
        run=config.run.name,
        step=state["step"],
        tokens=state["tokens"],
        n_loops=config.mean_loops if options.loops is None else options.loops,
    )
    tokenizer = None if options.no_tokenizer else _tokenizer(run, config)
    total = sum(output.nbytes for output in outputs(source, dtype))
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("weights", total=total)
        write_folder(
            options.out, source, record, tokenizer, dtype, shard_bytes, lambda count: progress.advance(task, count)
        )
    print(
        f"{options.out}: {config.run.name} at step {record.step:,}, {total / 1e9:.3g} GB of weights, "
        f"depth {record.n_loops}" + ("" if tokenizer else ", without a tokenizer")
    )


def _checkpoint(run: Path, step: int | None) -> Path:
    folder = run / "checkpoints"
    if step is None:
        return newest_valid_checkpoint(folder)
    checkpoint = folder / step_folder_name(step)
    damage = find_damage(checkpoint)
    if damage is not None:
        raise BadInputError(f"{checkpoint}: {damage}; name a --step whose checkpoint is intact")
    return checkpoint


def _source(checkpoint: Path, form: str, dtype_name: str) -> tuple[torch.dtype, WeightSource]:
    """What is written, and the form of the checkpoint that is read for it.

    The plain weights are what the model computes with; asked for more bits than they have, the partitions are read.
    """
    trained = DTYPES[read_record(checkpoint)["identity"]["topology"].get("dtype", "fp32")]
    dtype = trained if dtype_name == "auto" else DTYPES[dtype_name]
    if form == "auto" and (checkpoint / WEIGHTS / INDEX).is_file():
        plain = open_checkpoint(checkpoint, "weights")
        if dtype.itemsize <= plain.dtype.itemsize:
            return dtype, plain
        form = "sharded"
    return dtype, open_checkpoint(checkpoint, form)


def _tokenizer(run: Path, config: TrainingConfig) -> RunTokenizer:
    kept = load_kept_tokenizer(run)
    if kept is None:
        dataset = open_main(config.data)
        return RunTokenizer(dataset.tokenizer, dataset.tokenizer_suffix, dataset.tokenizer_bytes)
    file = run / TOKENIZER_FOLDER / read_json_object(run / TOKENIZER_FOLDER / DESCRIPTION_NAME)["file"]
    return RunTokenizer(kept, file.suffix, file.read_bytes())


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``512MiB`` or a plain number; ``BadInputError`` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise BadInputError(f"--shard-size {render_text(text)}: must be a size such as 5GB, 500MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


if __name__ == "__main__":
    exit_with_status(main)
