"""The settings of one data preparation: what is read, how it is cleaned, and what the shards look like.

One JSON file (``configs/data/NAME.json``), one section a stage, each section the settings of exactly that stage: the
key of a finished stage is a hash of its section, so changing a number re-runs that stage and what follows from it,
and nothing before it. Sizes are bytes, characters or tokens, as the names say; fractions lie in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values do not change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSettings(Section):
    """A folder of JSON-lines files (plain, .gz, .xz, .zst or .bz2), one document a line.

    A document has its text under ``text_key``, an optional id under ``id_key``, and optional ``metadata`` with
    ``domain`` and ``source``. ``domain`` here is for documents that name none of their own.
    """

    path: str = Field(min_length=1)
    pattern: str = "*.jsonl*"
    domain: Name = "text"
    text_key: str = "text"
    id_key: str = "id"


class ExecutionSettings(Section):
    """How many processes work at once; never changes what they write."""

    workers: int = Field(default=2, ge=1)


class CleanSettings(Section):
    """Unicode and whitespace."""

    fix_encoding: bool = True
    unicode_form: Literal["NFC", "NFKC"] | None = "NFC"
    collapse_spaces: bool = True


class QualitySettings(Section):
    """Which documents are worth keeping; the defaults are for books and documentation, not for web pages.

    FineWeb's defaults would drop most verse and nearly all reference text: short lines and few full stops are
    natural there. ``top_ngrams`` and ``duplicate_ngrams`` are pairs (n, largest fraction of characters).
    """

    min_characters: int = Field(default=200, ge=1)
    max_characters: int = Field(default=200_000, ge=1)
    min_words: int = Field(default=40, ge=1)
    min_mean_word_length: float = Field(default=3.0, gt=0)
    max_mean_word_length: float = Field(default=10.0, gt=0)
    max_symbol_ratio: Fraction = 0.1
    min_alphabetic_words: Fraction = 0.6
    min_stop_words: int = Field(default=2, ge=0)
    max_duplicate_line_fraction: Fraction = 0.5
    max_duplicate_line_characters: Fraction = 0.2
    top_ngrams: tuple[tuple[int, Fraction], ...] = ((2, 0.2), (4, 0.16))
    duplicate_ngrams: tuple[tuple[int, Fraction], ...] = ((5, 0.3), (10, 0.2))


class DedupSettings(Section):
    """Exact duplicates by hash, near-duplicates by MinHash with locality-sensitive buckets.

    A pair of Jaccard similarity s is found with probability ``1 - (1 - s**hashes_per_bucket)**buckets``: with the
    defaults 0.92 at s = 0.8 and 0.56 at s = 0.7.
    """

    exact: bool = True
    minhash: bool = True
    ngram: int = Field(default=5, ge=1)
    buckets: int = Field(default=14, ge=1, le=1000)
    hashes_per_bucket: int = Field(default=8, ge=1)
    seed: int = Field(default=1, ge=0, lt=2**32)


class SplitSettings(Section):
    """Which documents are held out: those whose keyed hash falls in the lowest ``validation_fraction``."""

    validation_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0, lt=2**63)


class TokenizerSettings(Section):
    """SentencePiece BPE with byte fallback, trained on about ``sample_bytes`` of the training documents.

    The floor on ``vocab_size``: 256 bytes, the unknown, end and newline pieces, and room for characters.
    """

    vocab_size: int = Field(default=4096, ge=300, le=2**31)
    sample_bytes: int = Field(default=20_000_000, ge=1)


class ShardSettings(Section):
    """A shard is closed after the document that brings it to ``max_tokens``."""

    max_tokens: int = Field(default=100_000_000, ge=1)


class DataSettings(Section):
    """Everything ``python data_pipeline/main.py --config FILE`` reads."""

    name: Name
    output: str = Field(min_length=1)
    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    execution: ExecutionSettings = ExecutionSettings()
    clean: CleanSettings = CleanSettings()
    quality: QualitySettings = QualitySettings()
    dedup: DedupSettings = DedupSettings()
    split: SplitSettings = SplitSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    shards: ShardSettings = ShardSettings()
