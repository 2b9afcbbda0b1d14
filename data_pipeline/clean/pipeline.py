"""Cleaning: HTML becomes text, text its normal form, and what is not worth keeping goes, each for a named reason.

The order, cheap before dear::

    extract    HTML documents only                     html_too_large, html_too_deep, extraction_failed ... empty
    normalise  encoding, Unicode, whitespace
    length     in characters                           empty, too_short, too_long
    language   fastText                                language
    quality    Gopher                                  gopher_short_doc ... gopher_enough_stop_words
    repetition Gopher                                  dup_para_frac ... duplicated_10_n_grams
    c4         takes lines out, then judges            lorem_ipsum, curly_bracket, too_few_sentences
    fineweb    lines                                   line_punct_ratio, short_line_ratio, char_dup_ratio, list_ratio
    classifier a learned model                         quality_score
    personal information is replaced

FineWeb and datatrove's examples have repetition before quality. What is kept is the same, but quality costs a tenth as
much. A document is split into words once (words.py), and all rules share that. Each source has settings of its own,
found by the document's origin. One step does it all: between separate datatrove steps, bookkeeping costs as much as the
rules do.
"""

from __future__ import annotations

import importlib.metadata
import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.clean.c4 import c4_editor
from data_pipeline.clean.classifier import check_classifier, quality_score
from data_pipeline.clean.extraction import HTML, extract_text
from data_pipeline.clean.fineweb import fineweb_rule
from data_pipeline.clean.gopher_quality import gopher_quality_rule
from data_pipeline.clean.gopher_repetition import gopher_repetition_rule
from data_pipeline.clean.language import find_language_model, identify_language
from data_pipeline.clean.normalise import normalise
from data_pipeline.clean.personal_information import replace_personal_information
from data_pipeline.clean.rules import Rule, length_rule
from data_pipeline.clean.rulings import without_rulings
from data_pipeline.clean.samples import KEPT, SAMPLES_FOLDER, Samples
from data_pipeline.clean.settings import CleanSettings
from data_pipeline.clean.words import Page
from data_pipeline.execution.tally import (
    CountDocuments,
    DocumentWriter,
    DroppedWriter,
    Tally,
    add_to_tally,
    write_tally,
)
from launch.files import sha256_of

STEPS = ("extract", "length", "language", "quality", "repetition", "c4", "fineweb", "classifier")
# Lengths are counted in bins a quarter of an octave wide: bin k holds 2**(k/4) to 2**((k+1)/4) bytes.
BINS_PER_OCTAVE = 4
LIBRARIES = ("ftfy", "resiliparse", "trafilatura", "fasttext-numpy2-wheel")
Drop = tuple[str, str]


def length_bin(size_bytes: int) -> int:
    """The bin of a document of ``size_bytes`` (at least 1)."""
    return math.floor(BINS_PER_OCTAVE * math.log2(size_bytes))


class DocumentCleaner:
    """The cleaning of one source's documents."""

    def __init__(self, settings: CleanSettings) -> None:
        self.settings = settings
        self._length = length_rule(settings.length)
        self._rules: list[tuple[str, Rule]] = []
        if settings.gopher_quality:
            self._rules.append(("quality", gopher_quality_rule(settings.gopher_quality)))
        if settings.gopher_repetition:
            self._rules.append(("repetition", gopher_repetition_rule(settings.gopher_repetition)))
        self._edit = c4_editor(settings.c4) if settings.c4 else None
        self._fineweb = fineweb_rule(settings.fineweb) if settings.fineweb else None
        self._language_model = find_language_model(settings.language) if settings.language else None
        if settings.classifier:
            check_classifier(settings.classifier)

    def clean(self, document: Document) -> Drop | None:
        """Clean ``document`` in place; returns the step and the reason for which it is to be dropped, or None.

        Sets ``language``, ``language_score`` and ``quality_score`` in its metadata where those are worked out.
        """
        settings = self.settings
        if document.metadata.get("media_type") == HTML:
            document.text, reason = extract_text(document.text, settings.extraction)
            if reason:
                return "extract", reason
        document.text = normalise(document.text, settings.normalise)
        page = Page(document.text)
        if reason := self._length(page):
            return "length", reason
        if settings.language and self._language_model and not self._is_language_wanted(document):
            return "language", "language"
        judged = Page(without_rulings(page.text)) if settings.ignore_rulings else page
        for step, rule in self._rules:
            if reason := rule(judged):
                return step, reason
        if self._edit:
            document.text, reason = self._edit(page.text)
            if reason:
                return "c4", reason
            page = page if document.text == page.text else Page(document.text)
            if reason := self._length(page):
                return "length", reason
        if self._fineweb and (reason := self._fineweb(page)):
            return "fineweb", reason
        if settings.classifier:
            score = quality_score(document.text, settings.classifier)
            document.metadata["quality_score"] = score
            if score < settings.classifier.min_score:
                return "classifier", "quality_score"
        if settings.personal_information:
            document.text = replace_personal_information(document.text, settings.personal_information)
        return None

    def _is_language_wanted(self, document: Document) -> bool:
        assert self.settings.language is not None
        assert self._language_model is not None
        language, score, wanted = identify_language(document.text, self.settings.language, self._language_model)
        document.metadata["language"] = language
        document.metadata["language_score"] = round(score, 6)
        return wanted


class CleanDocuments(PipelineStep):
    """Cleans each document by the settings of its source, and accounts for all of them.

    ``settings[i]`` is for documents of origin ``{"source": i}``; documents without an origin follow the first.
    Beside the documents dropped: tallies of languages (all documents) and lengths (those kept), and samples.
    """

    name = "Ice clean"
    type = "🧹 - CLEAN"

    def __init__(self, settings: Sequence[CleanSettings], folder: Path) -> None:
        super().__init__()
        self.settings = tuple(settings)
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass on what is kept."""
        cleaners = [DocumentCleaner(settings) for settings in self.settings]
        languages: Tally = {}
        lengths: Tally = {}
        samples = Samples()
        with ExitStack() as stack:
            dropped = {
                step: stack.enter_context(
                    DroppedWriter(self.folder / "dropped" / step, self.folder / "tallies" / f"dropped_{step}")
                )
                for step in STEPS
            }
            for document in data:
                origin = document.metadata.get("origin")
                drop = cleaners[origin["source"] if origin else 0].clean(document)
                domain, size = document.metadata["domain"], len(document.text.encode())
                if language := document.metadata.get("language"):
                    add_to_tally(languages, f"{language}\t{domain}", size)
                samples.offer(drop[1] if drop else KEPT, document.text, document.id, domain)
                if drop:
                    step, document.metadata["filter_reason"] = drop
                    dropped[step].write(document, rank)
                    continue
                add_to_tally(lengths, f"{length_bin(size)}\t{domain}", size)
                self.update_doc_stats(document)
                yield document
        write_tally(self.folder / "tallies" / "languages", rank, languages)
        write_tally(self.folder / "tallies" / "lengths", rank, lengths)
        samples.write(self.folder / SAMPLES_FOLDER, rank)


def clean_facts(settings: Sequence[CleanSettings]) -> dict[str, str]:
    """What cleaning depends on beside documents: each source's settings, models by content, versions of libraries.

    Raises ``BadInputError`` for a model that is missing or damaged.
    """
    facts = {name: importlib.metadata.version(name) for name in LIBRARIES}
    facts["unicode"] = unicodedata.unidata_version
    for index, clean in enumerate(settings):
        # A model is what is in its file, wherever that lies.
        facts[f"settings {index}"] = clean.model_dump_json(exclude={"classifier": {"path"}, "language": {"model"}})
        if clean.language:
            facts[f"language model {index}"] = sha256_of(find_language_model(clean.language))
        if clean.classifier:
            facts[f"classifier {index}"] = check_classifier(clean.classifier).sha256
    return facts


def clean_pipeline(reader: PipelineStep, settings: Sequence[CleanSettings], folder: Path) -> list[PipelineStep]:
    """Documents of ``reader`` to clean ones in ``folder/documents``; ``settings`` has one entry a source."""
    return [
        reader,
        CountDocuments(folder / "tallies" / "read"),
        CleanDocuments(settings, folder),
        CountDocuments(folder / "tallies" / "kept"),
        DocumentWriter(folder / "documents"),
    ]
