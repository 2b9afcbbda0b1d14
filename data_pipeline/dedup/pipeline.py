"""De-duplication: exact copies by hash, then near copies by MinHash and locality-sensitive hashing.

Both are datatrove's multi-step procedures: signatures a file, matching across files, then a filter that removes by
*position*. Their hazards, and what is done here: the filters let everything through when a removal list is missing, so
:func:`check_removed` compares what was to be removed with what was; positions shift when the file order or the number
of tasks differs between steps, so every step gets the same list with one task a file; ``only_dedup_in_index`` is on by
default, so it is turned off; hash seeds are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.typeshelper import ExtensionHelperSD

from data_pipeline.clean.words import FastWords
from data_pipeline.config import DedupSettings
from data_pipeline.execution.executors import Executor
from data_pipeline.execution.tally import CountDocuments, DocumentWriter, DroppedWriter, read_tallies, tally_sum
from data_pipeline.inputs.readers import DocumentReader, InputFile

POSITION_BYTES = 4


def document_text(document: Document) -> str:
    """What two exact duplicates share; datatrove chooses its hash function by this return annotation."""
    text: str = document.text
    return text


def _filter_pipeline(
    files: Sequence[InputFile], folder: Path, reason: str, make_filter: Callable[[DroppedWriter], PipelineStep]
) -> list[PipelineStep]:
    dropped = DroppedWriter(folder / "dropped", folder / "tallies" / "dropped", reason)
    return [
        DocumentReader(files),
        make_filter(dropped),
        CountDocuments(folder / "tallies" / "kept"),
        DocumentWriter(folder / "documents"),
    ]


def check_removed(folder: Path, removal_lists: Sequence[Path]) -> None:
    """Every position in ``removal_lists`` was dropped; otherwise the filter missed a list or read another's."""
    expected = sum(path.stat().st_size for path in removal_lists) // POSITION_BYTES
    removed = tally_sum(read_tallies(folder / "tallies" / "dropped"))["documents"]
    if removed != expected:
        raise RuntimeError(f"{folder}: {expected} duplicates were found but {removed} were removed")


def remove_exact_duplicates(executor: Executor, files: Sequence[InputFile], folder: Path) -> None:
    """Keep one of each group of identical texts; results in ``folder/documents``."""
    config = ExactDedupConfig(content_getter=document_text, only_dedup_in_index=False)
    scratch, logs, tasks = folder / "scratch", folder / "logs", len(files)
    signatures, duplicates = str(scratch / "signatures"), str(scratch / "duplicates")
    (scratch / "duplicates").mkdir(parents=True)  # stays empty, but must exist, when nothing is double
    signing = [
        DocumentReader(files),
        CountDocuments(folder / "tallies" / "signed"),
        ExactDedupSignature(signatures, config),
    ]
    executor.run(signing, tasks, logs / "1_signatures")
    executor.run([ExactFindDedups(signatures, duplicates, config)], 1, logs / "2_find")
    executor.run(
        _filter_pipeline(
            files, folder, "exact_duplicate", lambda dropped: ExactDedupFilter(duplicates, config, dropped)
        ),
        tasks,
        logs / "3_filter",
    )
    check_removed(folder, sorted((scratch / "duplicates").glob(f"*/*{ExtensionHelperSD.stage_2_duplicates}")))


def remove_near_duplicates(
    executor: Executor, files: Sequence[InputFile], folder: Path, settings: DedupSettings
) -> None:
    """Keep one of each cluster of near-identical texts; results in ``folder/documents``."""
    config = MinhashConfig(
        n_grams=settings.ngram,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        seed=settings.seed,
    )
    scratch, logs, tasks = folder / "scratch", folder / "logs", len(files)
    signatures, buckets, removals = (str(scratch / name) for name in ("signatures", "buckets", "removals"))
    signing = [
        DocumentReader(files),
        CountDocuments(folder / "tallies" / "signed"),
        MinhashDedupSignature(signatures, config, language=FastWords()),
    ]
    matching = [MinhashDedupBuckets(signatures, buckets, config=config, only_dedup_in_index=False)]
    executor.run(signing, tasks, logs / "1_signatures")
    executor.run(matching, settings.buckets, logs / "2_buckets")
    executor.run([MinhashDedupCluster(buckets, removals, config)], 1, logs / "3_clusters")
    executor.run(
        _filter_pipeline(files, folder, "near_duplicate", lambda dropped: MinhashDedupFilter(removals, dropped)),
        tasks,
        logs / "4_filter",
    )
    check_removed(folder, sorted(Path(removals).glob("*.remove")))
