"""A run's own copy of its tokenizer, so that text can be written from it where the data set is not.

``RUN/tokenizer/tokenizer.model`` (or ``.json``), and beside it ``description.json`` with its hash, its end token and
the size of its vocabulary. The hash is checked before the file is used: weights mean nothing under another tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from data_pipeline.tokenizer.interface import Tokenizer, load_tokenizer
from launch.files import path_inside, sha256_of, write_atomically, write_json_atomically
from launch.settings import BadInputError, parse_settings, read_json_object
from pretrain.config import Section
from pretrain.data.source import AnyDataset

FOLDER = "tokenizer"
DESCRIPTION_NAME = "description.json"


class KeptTokenizer(Section):
    """What the description says."""

    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    end_token_id: int = Field(ge=0)
    vocab_size: int = Field(ge=1)


def keep_tokenizer(dataset: AnyDataset, run: Path) -> None:
    """Copy the tokenizer of ``dataset`` into the run directory; nothing is written when it is there already."""
    folder = run / FOLDER
    kept = KeptTokenizer(
        file=f"tokenizer{dataset.tokenizer_suffix}",
        sha256=dataset.tokenizer_sha256,
        end_token_id=dataset.end_token_id,
        vocab_size=dataset.vocab_size,
    )
    target, description = folder / kept.file, folder / DESCRIPTION_NAME
    if description.is_file() and _is_copy(target, kept) and read_json_object(description) == kept.model_dump():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(target, dataset.tokenizer_bytes)
    write_json_atomically(description, kept.model_dump())


def _is_copy(path: Path, kept: KeptTokenizer) -> bool:
    return path.is_file() and sha256_of(path) == kept.sha256


def load_kept_tokenizer(run: Path) -> Tokenizer | None:
    """The run's tokenizer; None for a run that has no copy. ``BadInputError`` when it is not the described one."""
    folder = run / FOLDER
    if not (folder / DESCRIPTION_NAME).is_file():
        return None
    kept = parse_settings(KeptTokenizer, read_json_object(folder / DESCRIPTION_NAME), str(folder / DESCRIPTION_NAME))
    try:
        path = path_inside(folder, kept.file)
    except ValueError as error:
        raise BadInputError(f"{folder / DESCRIPTION_NAME}: {error}; remove {folder} to use the data set's") from None
    remedy = f"remove {folder} to use the data set's"
    if not _is_copy(path, kept):
        raise BadInputError(f"{path}: missing, or not the tokenizer that the run was trained with; {remedy}")
    tokenizer = load_tokenizer(path, kept.end_token_id)
    if tokenizer.vocab_size != kept.vocab_size:
        raise BadInputError(
            f"{path}: has {tokenizer.vocab_size} tokens, its description says {kept.vocab_size}; {remedy}"
        )
    return tokenizer
