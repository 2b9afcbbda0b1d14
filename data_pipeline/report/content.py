"""What the report says, gathered from the folders of finished stages: nothing here reads the documents again.

The one exception: stages that keep no samples (de-duplication) are sampled from what they dropped, from a
few files each, so the cost does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_pipeline.clean.pipeline import STEPS
from data_pipeline.clean.samples import SAMPLES_FOLDER, Sample, Samples, read_samples
from data_pipeline.execution.stages import Finished
from data_pipeline.execution.tally import Tally
from data_pipeline.inputs.readers import read_documents, stage_files
from data_pipeline.report.account import SourceAccount, by_reason

SAMPLED_FILES = 8
SAMPLED_DOCUMENTS = 200

Reasons = dict[str, Tally]


@dataclass(frozen=True)
class Loss:
    """What one step dropped: ``{reason: {domain: counts}}``."""

    step: str
    reasons: Reasons


@dataclass(frozen=True)
class ReportContent:
    """Everything on the page. Tallies are by domain; ``tokens`` is ``{split: {domain: tokens}}``.

    ``sources`` has the account of each source, by name, in the order of the settings.
    """

    name: str
    read: Tally
    losses: Sequence[Loss]
    train: Tally
    validation: Tally
    tokens: Mapping[str, Mapping[str, int]]
    lengths: Mapping[str, Mapping[int, int]]
    languages: Mapping[str, int]
    samples: Mapping[str, Sequence[Sample]]
    sources: Mapping[str, SourceAccount]

    @property
    def domains(self) -> list[str]:
        """All domains, largest first."""
        return sorted(self.read, key=lambda domain: (-self.read[domain]["bytes"], domain))


def _losses(cleaned: Finished, removals: Sequence[Finished]) -> Iterator[Loss]:
    yield Loss("quarantine", by_reason(cleaned.tally("quarantined")))
    for step in STEPS:
        yield Loss(step, by_reason(cleaned.tally(f"dropped_{step}")))
    for stage in removals:
        reasons: Reasons = {}
        for folder in sorted((stage.folder / "tallies").glob("dropped*")):
            reasons |= by_reason(stage.tally(folder.name))
        yield Loss(stage_name(stage), reasons)


def stage_name(stage: Finished) -> str:
    """What a stage is called: its folder without the key."""
    return stage.folder.name.rpartition("-")[0]


def _samples_of_dropped(stage: Finished) -> dict[str, list[Sample]]:
    folders = sorted(path for path in (stage.folder / "dropped").rglob("*") if path.is_dir())
    samples = Samples()
    for folder in [stage.folder / "dropped", *folders]:
        files = stage_files(folder)
        for file in files[:: max(1, len(files) // SAMPLED_FILES)][:SAMPLED_FILES]:
            for document in islice(read_documents(file), SAMPLED_DOCUMENTS):
                reason = document.metadata.get("filter_reason", stage_name(stage))
                samples.offer(reason, document.text, document.id, document.metadata["domain"])
    return samples.by_reason()


def collect(
    name: str,
    cleaned: Finished,
    removals: Sequence[Finished],
    report: Mapping[str, Any],
    tokens: Mapping[str, Mapping[str, int]],
) -> ReportContent:
    """The page's content; ``report`` is that of ``report.json``."""
    lengths: dict[str, dict[int, int]] = {}
    for key, counts in cleaned.tally("lengths").items():
        length, domain = key.split("\t")
        lengths.setdefault(domain, {})[int(length)] = counts["documents"]
    languages: dict[str, int] = {}
    for key, counts in cleaned.tally("languages").items():
        language = key.split("\t")[0]
        languages[language] = languages.get(language, 0) + counts["documents"]
    samples = read_samples(cleaned.folder / SAMPLES_FOLDER)
    for stage in removals:
        samples |= _samples_of_dropped(stage)
    return ReportContent(
        name=name,
        read=report["read"],
        losses=[loss for loss in _losses(cleaned, removals) if loss.reasons],
        train=report["train"],
        validation=report["validation"],
        tokens=tokens,
        lengths=lengths,
        languages=languages,
        samples=samples,
        sources=report["by_source"],
    )
