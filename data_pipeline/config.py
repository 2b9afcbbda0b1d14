"""The settings of one data preparation: what is read, how it is cleaned, and what the shards look like.

One JSON file (``configs/data/NAME.json``), one section a stage, each section the settings of exactly that stage: the
key of a finished stage is a hash of its section, so changing a number re-runs that stage and what follows from it,
and nothing before it. Sizes are bytes, characters or tokens, as the names say; fractions lie in [0, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.clean.settings import CleanSettings
from data_pipeline.section import Fraction, Name, Section
from launch.settings import SettingError


class SourceSettings(Section):
    """Where documents are and how they are stored: a folder (searched with all below it), a file, or either as a URL.

    ``path`` is anything that fsspec opens: ``/dumps``, ``s3://bucket/dumps``. ``pattern`` picks files by their path
    below it, as in ``*.jsonl.zst`` or ``**/*.md``; without one, every file of ``format`` counts. ``format`` "auto" goes
    by each file's name: ``.jsonl .ndjson .parquet .warc .html .htm .xhtml .txt .md .markdown .rst``, and those but for
    Parquet with ``.gz``, ``.xz``, ``.bz2`` or ``.zst`` after it.

    JSON lines and Parquet rows have their text under ``text_key``, an optional id under ``id_key``, and optional
    ``domain`` and ``source``, beside them or in ``metadata``. ``domain`` here is for documents that name none of their
    own, and so is ``name``, by default the last part of ``path``. ``encoding`` is that of text files.

    ``clean`` is how documents of this source are cleaned, as in ``{"profile": "code"}``; without one, as the general
    section says.
    """

    path: str = Field(min_length=1)
    pattern: str | None = Field(default=None, min_length=1)
    format: Literal["auto", "jsonl", "parquet", "warc", "html", "text"] = "auto"
    name: Name | None = None
    domain: Name = "text"
    text_key: str = "text"
    id_key: str = "id"
    encoding: str = "utf-8"
    follow_links: bool = False
    clean: CleanSettings | None = None

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            " ".encode(encoding)
        except (LookupError, ValueError):
            raise ValueError("is not an encoding of text; such are utf-8, cp1252, iso-8859-2, euc_jp") from None
        return encoding


class InputSettings(Section):
    """How inputs are dealt into pieces of work, and how much of them may be bad.

    ``piece_bytes`` is about the size of one piece of work, in bytes after decompression (estimated). A record over
    ``max_document_bytes`` is bad and never loaded. A run fails when a source has more bad records than
    ``max_bad_records`` and more than ``max_bad_fraction`` of all of its records; when all of its records are bad; and
    when more than ``max_bad_fraction`` of its files are damaged. ``digest`` says how changed files are noticed: by
    their "content", or by "listing" name, size and time or tag; "auto" is content on local disks, else listing.
    """

    piece_bytes: int = Field(default=2**26, ge=1)
    max_document_bytes: int = Field(default=2**25, ge=1)
    max_bad_fraction: Fraction = 1e-3
    max_bad_records: int = Field(default=10, ge=0)
    digest: Literal["auto", "content", "listing"] = "auto"


class SlurmSettings(Section):
    """What ``--executor slurm`` asks for: ``tasks`` array tasks at most, in arrays of ``max_array_size`` at most.

    ``time`` is a task's limit as Slurm writes it (minutes, or ``[days-]hours:minutes:seconds``); a task cut off by it
    loses the piece it is at, no more. ``arguments`` are further options of ``sbatch``, such as ``--qos=low``.
    ``driver_host`` is the name or address under which tasks reach the driver, if its host name will not do.
    """

    partition: Name | None = None
    account: Name | None = None
    time: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    cpus_per_task: int = Field(default=1, ge=1)
    mem_per_cpu_gb: int = Field(default=4, ge=1)
    tasks: int = Field(default=100, ge=1)
    max_array_size: int = Field(default=1000, ge=1)
    arguments: tuple[Annotated[str, Field(pattern="^--")], ...] = ()
    driver_host: str | None = None
    poll_seconds: float = Field(default=10.0, gt=0)


class ExecutionSettings(Section):
    """Where and on how many processes work is done; never changes what they write."""

    workers: int = Field(default=2, ge=1)
    slurm: SlurmSettings = SlurmSettings()


class DedupSettings(Section):
    """Exact duplicates by hash, near-duplicates by MinHash with locality-sensitive buckets, passages by sentences.

    The copy that comes first in the corpus stays. ``exact_text`` "normalised" takes texts for equal that differ only in
    case, diacritics, punctuation and space. A pair of Jaccard similarity s (of runs of ``ngram`` words) is found by
    MinHash with probability ``1 - (1 - s**hashes_per_bucket)**buckets``: with the defaults 0.92 at s = 0.8 and 0.56 at
    s = 0.7. ``sentences`` cuts runs of ``sentence_span`` sentences that occur again, if they have ``min_span_words``
    words, and drops documents that have fewer than ``min_words_left`` left.

    ``index`` is a folder to keep the keys of this corpus in; ``against`` names such folders of earlier ones, whose
    documents are left out.
    """

    exact: bool = True
    exact_text: Literal["plain", "normalised"] = "plain"
    minhash: bool = True
    ngram: int = Field(default=5, ge=1)
    buckets: int = Field(default=14, ge=1, le=1000)
    hashes_per_bucket: int = Field(default=8, ge=1, le=1000)
    seed: int = Field(default=1, ge=0, lt=2**32)
    sentences: bool = False
    sentence_span: int = Field(default=3, ge=1)
    min_span_words: int = Field(default=10, ge=1)
    min_words_left: int = Field(default=40, ge=0)
    index: str | None = Field(default=None, min_length=1)
    against: tuple[Annotated[str, Field(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _indices_make_sense(self) -> DedupSettings:
        if not (self.exact or self.minhash or self.sentences):
            for key in ("index", "against"):
                if getattr(self, key):
                    raise SettingError(key, getattr(self, key), "no keys are made; set exact, minhash or sentences")
        if self.index is not None and Path(self.index) in map(Path, self.against):
            raise SettingError("index", self.index, "is also in against; an index cannot replace what it builds on")
        return self


class EvaluationSetSettings(Section):
    """An evaluation set: JSON lines, an item a line; ``fields`` are the texts to look for, as question and answer."""

    name: Name
    path: str = Field(min_length=1)
    fields: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)


class DecontaminationSettings(Section):
    """Documents that share ``ngram`` consecutive words with an item of an evaluation set are dropped, or cut.

    A field of fewer words is looked for whole, down to ``min_words``. With "cut", the matching passage goes, and the
    document only if fewer than ``min_words_left`` words remain.
    """

    sets: tuple[EvaluationSetSettings, ...] = ()
    ngram: int = Field(default=13, ge=1, le=999)
    min_words: int = Field(default=8, ge=1)
    action: Literal["drop", "cut"] = "drop"
    min_words_left: int = Field(default=40, ge=0)

    @model_validator(mode="after")
    def _names_and_lengths_fit(self) -> DecontaminationSettings:
        if self.min_words > self.ngram:
            raise SettingError("min_words", self.min_words, f"is more than ngram = {self.ngram}")
        names = [entry.name for entry in self.sets]
        for name in names:
            if names.count(name) > 1:
                raise SettingError("sets", name, "two evaluation sets have this name; give each its own")
        return self


class SplitSettings(Section):
    """Which documents are held out: those whose keyed hash falls in the lowest ``validation_fraction``."""

    validation_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0, lt=2**63)


class TokenizerSettings(Section):
    """SentencePiece BPE with byte fallback, trained on about ``sample_bytes`` of the training documents; or one given.

    The floor on ``vocab_size``: 256 bytes, the unknown, end and newline pieces, and room for characters.
    ``control_tokens`` are reserved: they have ids (2, 3, ...) and no text has those.

    ``path`` names a SentencePiece ``.model`` or a Hugging Face ``tokenizer.json`` to use as it is; nothing is trained
    then. ``end_token`` is the token that ends a document (needed for ``.json``). A tokenizer that does not give every
    text back is refused unless ``allow_lossy``.

    ``engine`` never changes the token ids: ``auto`` is the fastest one that proves to give the tokenizer's own.
    """

    vocab_size: int = Field(default=4096, ge=300, le=2**31)
    sample_bytes: int = Field(default=20_000_000, ge=1)
    control_tokens: tuple[Annotated[str, Field(pattern=r"^\S+$", max_length=80)], ...] = ()
    path: str | None = Field(default=None, min_length=1)
    end_token: str | None = Field(default=None, min_length=1)
    allow_lossy: bool = False
    engine: Literal["auto", "gigatoken", "kitoken", "reference"] = "auto"


class ShardSettings(Section):
    """A shard is closed after the document that brings it to ``max_tokens``: 2 bytes each, 4 past 65,536 of them.

    The default makes shards of 1.9 or 3.7 GiB.
    """

    max_tokens: int = Field(default=1_000_000_000, ge=1)


class DataSettings(Section):
    """Everything ``python data_pipeline/main.py --config FILE`` reads."""

    name: Name
    output: str = Field(min_length=1)
    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    inputs: InputSettings = InputSettings()
    execution: ExecutionSettings = ExecutionSettings()
    clean: CleanSettings = CleanSettings()
    dedup: DedupSettings = DedupSettings()
    decontamination: DecontaminationSettings = DecontaminationSettings()
    split: SplitSettings = SplitSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    shards: ShardSettings = ShardSettings()

    @property
    def clean_by_source(self) -> tuple[CleanSettings, ...]:
        """How each source's documents are cleaned: by its own section, else by the general one."""
        return tuple(source.clean or self.clean for source in self.sources)
