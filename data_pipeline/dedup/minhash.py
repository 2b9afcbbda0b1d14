"""Nearly identical texts once: MinHash signatures in locality-sensitive buckets (Broder 1997; Lee et al. 2021).

The shingles of a text are the hashes of its runs of ``ngram`` words (normal_form.py). For each of
``buckets * hashes_per_bucket`` functions ``g(x) = (a x + b mod 2^64) mod (2^61 - 1)``, the signature has the least g
over all shingles; two texts agree in one number with probability s, the Jaccard similarity of their sets of shingles.
Texts that agree in all r numbers of any of the b buckets are duplicates: probability ``1 - (1 - s^r)^b``.

The functions, the shingles and so the signatures are datatrove's, and the files too, byte for byte. What is faster is
how they are computed. Shifted by three bits, ``z = 8 (a x + b) mod 2^64`` orders the shingles by the low 61 bits of
``a x + b``; the modulus adds the top three bits, at most 7. So the shingle with the least z has the least g, unless
another one comes within 7 of 2^61 (a chance of 1e-15 a number for a thousand shingles), and g itself is needed for that
one only. The division, which costs more than all else, is gone from the pass over (functions, shingles).

A text of fewer than ``ngram`` words has no shingle and so no near-duplicate; it stays. Blocks of ``BLOCK`` shingles
keep the memory of a task at about a megabyte whatever the length of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.matching import RANGE_BYTES
from data_pipeline.dedup.normal_form import Hashes, Words
from data_pipeline.dedup.procedure import NO_INDEX, Indexing, remove_duplicates
from data_pipeline.dedup.records import Layout, write_signatures
from data_pipeline.execution.executors import Executor
from data_pipeline.inputs.readers import InputFile

MERSENNE_PRIME = np.uint64((1 << 61) - 1)
BLOCK = 1024


class MinHasher:
    """Signatures of texts under one family of hash functions; F is the number of functions."""

    def __init__(self, ngram: int, buckets: int, hashes_per_bucket: int, seed: int) -> None:
        self.ngram = ngram
        self.n_functions = buckets * hashes_per_bucket
        self.seed = seed

    @cached_property
    def _functions(self) -> tuple[Hashes, Hashes]:
        generator = np.random.RandomState(self.seed)  # the generator and the draws of datatrove
        shape = (1, self.n_functions)
        a = generator.randint(1, MERSENNE_PRIME, dtype=np.uint64, size=shape)
        b = generator.randint(0, MERSENNE_PRIME, dtype=np.uint64, size=shape)
        return a[0], b[0]

    @cached_property
    def _work(self) -> Hashes:
        return np.empty(self.n_functions * BLOCK, np.uint64)

    def shingles(self, text: str) -> Hashes:
        """The hashed n-grams of ``text``, in order, repetitions included."""
        return Words.of(text).ngram_hashes(self.ngram)

    def signature(self, shingles: Hashes) -> Hashes:
        """The least value of each function over ``shingles`` (at least one): shape (F,)."""
        a, b = self._functions
        a8, b8 = (a << np.uint64(3))[:, None], (b << np.uint64(3))[:, None]
        rows = np.arange(self.n_functions)
        least, shingle_of_least = np.empty((0, 0)), shingles[:0]
        for start in range(0, len(shingles), BLOCK):
            block = shingles[start : start + BLOCK]
            z = self._work[: self.n_functions * len(block)].reshape(self.n_functions, len(block))
            np.multiply(block, a8, out=z)
            np.add(z, b8, out=z)
            index = z.argmin(axis=1)
            lowest = z[rows, index]
            if not start:
                least, shingle_of_least = lowest, block[index]
            else:
                lower = lowest < least
                least = np.where(lower, lowest, least)
                shingle_of_least = np.where(lower, block[index], shingle_of_least)
        return (shingle_of_least * a + b) % MERSENNE_PRIME


def layout_of(settings: DedupSettings) -> Layout:
    """The records of these settings."""
    return Layout("minhash", settings.buckets, settings.hashes_per_bucket)


def hasher_of(settings: DedupSettings) -> MinHasher:
    """The hash functions of these settings."""
    return MinHasher(settings.ngram, settings.buckets, settings.hashes_per_bucket, settings.seed)


class SignMinHash(PipelineStep):
    """Writes the signatures of a piece: what datatrove's ``MinhashDedupSignature`` writes."""

    name = "Ice MinHash signatures"
    type = "🫂 - DEDUP"

    def __init__(self, folder: Path, settings: DedupSettings) -> None:
        super().__init__()
        self.folder = folder
        self.settings = settings

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Sign one piece."""
        hasher, layout = hasher_of(self.settings), layout_of(self.settings)
        signatures: list[Hashes] = []
        positions: list[int] = []
        for position, document in enumerate(data):
            shingles = hasher.shingles(document.text)
            if shingles.size:
                signatures.append(hasher.signature(shingles))
                positions.append(position)
        keys: npt.NDArray[np.uint64] = np.array(signatures, np.uint64).reshape(-1, layout.buckets, layout.columns)
        write_signatures(layout, self.folder, rank, keys, [np.array(positions, np.uint64)])


def remove_near_duplicates(
    executor: Executor,
    files: Sequence[InputFile],
    folder: Path,
    settings: DedupSettings,
    indexing: Indexing = NO_INDEX,
    range_bytes: int = RANGE_BYTES,
) -> None:
    """Keep the first of each cluster of near-identical texts; results in ``folder/documents``."""
    sign = SignMinHash(folder / "scratch" / "signatures", settings)
    remove_duplicates(executor, files, folder, layout_of(settings), sign, "near_duplicate", indexing, range_bytes)
