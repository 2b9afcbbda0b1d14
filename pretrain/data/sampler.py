"""A run's samples: sources, mixture and stages put together. Sample i is a pure function of (seed, data, plan, i).

``data_pipeline.mixture`` says which source sample i comes from and which place in that source's epoch it is; the
source's keyed permutation turns the place into a row. Every sample of a run, past and future, can be read at any moment
by any process. The whole state is the number of samples seen.

    source, epoch, place, part = plan.locate(i)        row = permutation(seed, source, epoch)(place)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.reader import Dataset
from data_pipeline.mixture import SamplingPlan, Source, Stage
from launch.settings import BadInputError
from pretrain.config import DataSection, SourceSection
from pretrain.data.packing import Row
from pretrain.data.selection import Selection, chosen_documents
from pretrain.data.sequences import TokenSequences
from pretrain.data.source import AnyDataset, RowSource, open_source
from pretrain.data.task_rows import TaskRows
from pretrain.tasks.dataset import TaskDataset

CACHE_FOLDER = ".cache"

Taken = dict[str, list[tuple[str, NDArray[np.bool_]]]]
"""By fingerprint: the names of the sources, and the documents that each has."""


class Sampler:
    """Every training sample of a run, by its number. Share one between threads: reading changes nothing."""

    def __init__(self, section: DataSection, sources: Sequence[RowSource], seed: int) -> None:
        self.section, self.sources, self.seed = section, tuple(sources), seed
        self.plan = SamplingPlan(
            [
                Source(settings.label, sequences.n_blocks, sequences.key, settings.max_epochs)
                for settings, sequences in zip(section.all_sources, sources, strict=True)
            ],
            [
                Stage(stage.from_tokens, stage.sequence_length, stage.weights, stage.mean_loops)
                for stage in section.all_stages
            ],
            section.sequence_length,
            section.global_batch_size,
            seed,
        )

    def stage_at(self, sample: int) -> Stage:
        """The stage that a step beginning with ``sample`` belongs to."""
        return self.plan.segment_at(sample).stage

    def rows(self, sample_ids: Sequence[int], with_documents: bool = False) -> list[Row]:
        """The rows of samples of one stage, each of the stage's sequence length."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        located = self.plan.locate(ids)
        length = self.stage_at(int(ids[0])).sequence_length
        blocks = np.empty_like(ids)
        for number in np.unique(located.source):
            chosen = located.source == number
            blocks[chosen] = self.sources[number].blocks_at(located.epoch[chosen], located.place[chosen])
        return [
            self.sources[source].read(block, part * length, length, with_documents)
            for source, block, part in zip(located.source.tolist(), blocks.tolist(), located.part.tolist(), strict=True)
        ]

    def require_enough(self, total_samples: int) -> None:
        """Raise ``BadInputError`` when the run's ``total_samples`` cannot be had as the configuration asks."""
        used_up = self.plan.used_up(total_samples)
        if self.plan.end is not None and self.plan.end < total_samples:
            self._refuse(used_up[-1], total_samples, "and nothing is left then")
        if used_up and self.section.when_used_up == "refuse":
            self._refuse(used_up[0], total_samples, 'and data.when_used_up = "refuse"')

    def _refuse(self, used_up: tuple[str, int], total_samples: int, why: str) -> None:
        name, sample = used_up
        cap = next(source.max_epochs for source in self.plan.sources if source.name == name)
        raise BadInputError(
            f"data.sources: max_epochs = {cap} of {name}: used up after {self.plan.tokens_before(sample):,} of the "
            f"run's {self.plan.tokens_before(total_samples):,} tokens (step {sample // self.section.global_batch_size})"
            f", {why}; raise max_epochs, lower the weight, or train fewer steps"
        )

    def identity(self) -> dict[str, Any]:
        """What the samples are a function of, as a checkpoint keeps it; compare two of them with :func:`past_of`."""
        settings = zip(self.section.all_sources, self.sources, strict=True)
        return {
            "seed": self.seed,
            "sequence_length": self.section.sequence_length,
            "global_batch_size": self.section.global_batch_size,
            "packing": self.section.packing,
            "document_mask": self.section.document_mask,
            "sources": {
                source.label: {
                    "fingerprint": sequences.dataset.fingerprint,
                    "selection": selection_of(source).key(),
                }
                for source, sequences in settings
            },
            "segments": self.plan.history(),
        }


_NOT_SAID_BEFORE = {"packing": "concatenate", "document_mask": False}


def past_of(identity: dict[str, Any], next_sample: int) -> dict[str, Any]:
    """The part of an identity that samples before ``next_sample`` depend on, flat, keyed as an error should name it.

    Two runs with the same past have seen the same samples; what they would see later may differ. Also reads what older
    checkpoints hold: one ``fingerprint`` in place of sources and segments.
    """
    past = {key: identity.get(key, _NOT_SAID_BEFORE.get(key)) for key in ("seed", "global_batch_size")}
    past |= {key: identity.get(key, default) for key, default in _NOT_SAID_BEFORE.items()}
    past["sequence_length"] = identity.get("sequence_length")
    if "segments" not in identity:
        return past | {"fingerprint": identity.get("fingerprint"), "selection": ""}
    segments = [segment for segment in identity["segments"] if segment["from_sample"] < max(next_sample, 1)]
    seen = sorted({name for segment in segments for name in segment["weights"]})
    for name in seen:
        prefix = "" if len(seen) == 1 else f"sources.{name}."
        past |= {f"{prefix}{key}": value for key, value in identity["sources"][name].items()}
    for number, segment in enumerate(segments):
        prefix = "" if number == 0 else f"from_sample_{segment['from_sample']}."
        if segment["sequence_length"] != identity["sequence_length"] or number:
            past[f"{prefix}stage_sequence_length"] = segment["sequence_length"]
        if segment["mean_loops"] is not None:
            past[f"{prefix}mean_loops"] = segment["mean_loops"]
        if len(seen) > 1:
            past |= {f"{prefix}weights.{name}": weight for name, weight in segment["weights"].items()}
    return past


def selection_of(source: SourceSection) -> Selection:
    """The documents that a source's settings choose."""
    return Selection(
        source.domains,
        source.min_document_tokens,
        source.max_document_tokens,
        source.difficulty,
        source.difficulty_file,
    )


def check_vocabulary(dataset: AnyDataset, model_vocab_size: int) -> None:
    """Raise ``BadInputError`` when the data has token ids that the model has no embedding for."""
    if dataset.vocab_size > model_vocab_size:
        raise BadInputError(
            f"model.vocab_size = {model_vocab_size}: smaller than the {dataset.vocab_size} tokens of {dataset.folder}; "
            f"set it to at least {dataset.vocab_size}, or prepare the data with a smaller tokenizer.vocab_size"
        )


def open_sampler(section: DataSection, seed: int, vocab_size: int, main: AnyDataset) -> Sampler:
    """Open every source of ``section``, and check that they fit together and the model.

    ``main`` is the open data set of ``data.path``. Raises ``BadInputError`` for a source that cannot be opened, has
    another tokenizer than ``main``, or shares documents with another source.
    """
    datasets = {main.folder: main} if isinstance(main, Dataset) else {}
    taken: Taken = {}
    sources: list[RowSource] = []
    for source in section.all_sources:
        dataset = open_source(source, datasets)
        check_vocabulary(dataset, vocab_size)
        if dataset.tokenizer_sha256 != main.tokenizer_sha256:
            remedy = (
                "a run's tasks need one alphabet, and go with no text"
                if isinstance(dataset, TaskDataset) or isinstance(main, TaskDataset)
                else "prepare one of them again with the other's"
            )
            raise BadInputError(
                f"{dataset.folder}: was prepared with another tokenizer than {main.folder}, so its token ids mean "
                f"other text; {remedy}"
            )
        if isinstance(dataset, TaskDataset):
            sources.append(TaskRows(dataset, section.sequence_length, seed))
            continue
        datasets[dataset.folder] = dataset
        selection = selection_of(source)
        chosen = None if selection.is_everything else chosen_documents(dataset, "train", selection)
        if len(section.all_sources) > 1:
            _require_no_overlap(source.label, dataset, chosen, taken)
        cache = dataset.folder / CACHE_FOLDER if section.cache is None else Path(section.cache)
        sources.append(
            TokenSequences(dataset, "train", section.sequence_length, seed, section.packing, selection, chosen, cache)
        )
    return Sampler(section, sources, seed)


def _require_no_overlap(
    name: str,
    dataset: Dataset,
    chosen: NDArray[np.bool_] | None,
    taken: Taken,
) -> None:
    """Each document is in one source only, or counters and epochs would mean nothing."""
    documents = sum(shard.document_ends.size for shard in dataset.split("train").shards)
    mine = np.ones(documents, dtype=bool) if chosen is None else chosen
    for other, theirs in taken.setdefault(dataset.fingerprint, []):
        if shared := int((mine & theirs).sum()):
            raise BadInputError(
                f"data.sources: {name} and {other}: share {shared} documents of {dataset.folder}; choose domains, "
                "lengths or difficulties so that no document is in two sources"
            )
    taken[dataset.fingerprint].append((name, mine))
