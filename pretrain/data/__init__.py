"""Batches out of token shards: sample i is a pure function of (seed, data set fingerprints, mixture, i).

``selection`` which documents, ``packing`` how they fill rows, ``sequences`` a source's rows in a shuffled order,
``source`` what a source is (shards, or a task of ``pretrain.tasks`` through ``task_rows``), ``sampler`` the mixture of
sources over a run, ``loader`` batches for a rank, read ahead, ``validation`` the held-out split. Which source a sample
comes from is worked out by ``data_pipeline.mixture``.

Shapes: B micro-batch, S sequence length.
"""

from data_pipeline.permutation import KeyedPermutation
from pretrain.data.loader import PADDING_SAMPLE, Batch, BatchLoader, Prefetcher, SlowDataError
from pretrain.data.sampler import Sampler, check_vocabulary, open_sampler, past_of
from pretrain.data.sequences import Sample, TokenSequences
from pretrain.data.source import AnyDataset, RowSource, open_main, open_source
from pretrain.data.task_rows import TaskHeldOut, TaskRows
from pretrain.data.validation import AnyHeldOut, HeldOut, held_out_sets, validation_batches

__all__ = [
    "PADDING_SAMPLE",
    "AnyDataset",
    "AnyHeldOut",
    "Batch",
    "BatchLoader",
    "HeldOut",
    "KeyedPermutation",
    "Prefetcher",
    "RowSource",
    "Sample",
    "Sampler",
    "SlowDataError",
    "TaskHeldOut",
    "TaskRows",
    "TokenSequences",
    "check_vocabulary",
    "held_out_sets",
    "open_main",
    "open_sampler",
    "open_source",
    "past_of",
    "validation_batches",
]
