"""The story of one preparation: from raw files to a published data set, stage by stage.

Each stage reads the documents of the one before and is skipped when it has been finished under the same settings and
content (``execution/stages.py``).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.config import DataSettings, TokenizerSettings
from data_pipeline.dedup.evaluation_sets import check_evaluation_sets
from data_pipeline.dedup.index import check_index_target, open_indices
from data_pipeline.dedup.procedure import Indexing
from data_pipeline.disk_full import said_in_one_line
from data_pipeline.execution.executors import Executor
from data_pipeline.execution.progress import Reporter
from data_pipeline.execution.stages import Finished, Stage, StageRunner, digest_of
from data_pipeline.execution.tally import tally_by, tally_sum
from data_pipeline.inputs.file_tables import FileTable, describe_files, find_files
from data_pipeline.inputs.readers import stage_files
from data_pipeline.split import SPLITS
from launch.files import sha256_of, write_json_atomically
from launch.settings import BadInputError

EMPTY_REMEDY = "the corpus is too small or the clean section too strict; report of drops: {folder}/tallies"


class Preparation:
    """One run of the pipeline: the settings, and each stage as a method that returns what is finished."""

    def __init__(self, settings: DataSettings, executor: Executor, runner: StageRunner) -> None:
        self.settings = settings
        self.executor = executor
        self.runner = runner
        self.indices = open_indices(settings.dedup)

    def clean(self, tables: Sequence[FileTable]) -> Finished:
        """Raw files to clean documents; ``files.json`` says which file an origin's numbers stand for."""
        from data_pipeline.clean.pipeline import clean_facts, clean_pipeline
        from data_pipeline.inputs.piece_reader import PieceReader
        from data_pipeline.inputs.plan import plan_pieces, write_file_tables, write_pieces
        from data_pipeline.inputs.quarantine import check_quarantine, describe_quarantine

        settings = self.settings

        def build(folder: Path) -> None:
            pieces = plan_pieces(tables, settings.inputs)
            plan = folder / "scratch" / "pieces.jsonl"
            write_pieces(pieces, plan)
            write_file_tables(tables, folder / "files.json")
            reader = PieceReader(plan, folder, settings.inputs.max_document_bytes)
            pipeline = clean_pipeline(reader, settings.clean_by_source, folder)
            self.executor.run(pipeline, len(pieces), folder / "logs")

        facts = {
            f"{index:05d} {table.name} {table.source.model_dump_json(exclude={'path', 'pattern', 'clean'})}": digest_of(
                [(file.name, file.format, file.digest) for file in table.files]
            )
            for index, table in enumerate(tables)
        }
        # What is tolerated is judged each time, outside of the stage: another limit asks for no other cleaning.
        inputs = settings.inputs.model_dump(include={"piece_bytes", "max_document_bytes"})
        sections = [clean_facts(settings.clean_by_source), inputs]
        cleaned = self.runner.run(Stage("clean", sections, facts, build, watch=("read", "kept")))
        check_quarantine(cleaned.folder, tables, settings.inputs)
        put_aside = describe_quarantine(cleaned.folder)
        if put_aside:
            self.runner.reporter.line("quarantine", put_aside)
        return cleaned

    def exact(self, before: Finished) -> Finished:
        """Identical documents once."""
        from data_pipeline.dedup.exact import LAYOUT, remove_exact_duplicates

        def build(folder: Path) -> None:
            files, indexing = stage_files(before.folder / "documents"), self._indexing(LAYOUT.kind)
            remove_exact_duplicates(self.executor, files, folder, self.settings.dedup.exact_text, indexing)

        return self._deduplicate(before, "exact", {"exact_text"}, build)

    def minhash(self, before: Finished) -> Finished:
        """Nearly identical documents once."""
        from data_pipeline.dedup.minhash import remove_near_duplicates

        def build(folder: Path) -> None:
            files, indexing = stage_files(before.folder / "documents"), self._indexing("minhash")
            remove_near_duplicates(self.executor, files, folder, self.settings.dedup, indexing)

        return self._deduplicate(before, "minhash", {"ngram", "buckets", "hashes_per_bucket", "seed"}, build)

    def sentences(self, before: Finished) -> Finished:
        """Repeated passages once."""
        from data_pipeline.dedup.sentences import LAYOUT, remove_duplicate_sentences

        def build(folder: Path) -> None:
            files, indexing = stage_files(before.folder / "documents"), self._indexing(LAYOUT.kind)
            remove_duplicate_sentences(self.executor, files, folder, self.settings.dedup, indexing)

        return self._deduplicate(before, "sentences", {"sentence_span", "min_span_words", "min_words_left"}, build)

    def decontaminate(self, before: Finished) -> Finished:
        """Documents without what evaluation sets ask."""
        from data_pipeline.dedup.decontamination import decontaminate

        settings = self.settings.decontamination

        def build(folder: Path) -> None:
            decontaminate(self.executor, stage_files(before.folder / "documents"), folder, settings)

        contents = [sha256_of(Path(entry.path)) for entry in settings.sets]
        section = [settings.model_dump(exclude={"sets": {"__all__": {"path"}}}), contents]
        return self._after(before, "decontaminate", section, build, watch=("searched", "kept"))

    def write_index(self, stages: Mapping[str, Finished]) -> None:
        """Keep the keys of the de-duplication ``stages`` (by kind) under ``dedup.index``."""
        from data_pipeline.dedup.index import write_index

        dedup = self.settings.dedup
        if dedup.index is not None:
            parts = {kind: stage.folder / "index" / kind for kind, stage in stages.items()}
            with said_in_one_line(Path(dedup.index)):
                new = write_index(Path(dedup.index), self.settings.name, dedup, parts)
            self.runner.reporter.line("index", dedup.index if new else "already done")

    def _indexing(self, kind: str) -> Indexing:
        earlier = tuple(index.keys_of(kind) for index in self.indices)
        return Indexing(earlier, keep=self.settings.dedup.index is not None)

    def _deduplicate(self, before: Finished, kind: str, keys: set[str], build: Callable[[Path], None]) -> Finished:
        dedup = self.settings.dedup
        against = [index.fingerprint for index in self.indices]
        section = [dedup.model_dump(include=keys), dedup.index is not None, against]
        return self._after(before, kind, section, build, watch=("signed", "kept"))

    def split(self, before: Finished) -> Finished:
        """Documents dealt to train and validation."""
        from data_pipeline.split import split_pipeline

        def build(folder: Path) -> None:
            files = stage_files(before.folder / "documents")
            self.executor.run(split_pipeline(files, self.settings.split, folder), len(files), folder / "logs")
            for name in SPLITS:
                if not stage_files(folder / name):
                    counts = tally_sum(before.tally("kept"))
                    fraction = self.settings.split.validation_fraction
                    raise BadInputError(
                        f"split.validation_fraction = {fraction}: leaves no document for {name} out of "
                        f"{counts['documents']}; change it, or split.seed, or add documents"
                    )

        return self._after(before, "split", self.settings.split.model_dump(), build, watch=("kept",))

    def tokenizer(self, before: Finished) -> Finished:
        """The tokenizer: trained on training text only, or the given one."""
        from data_pipeline.tokenizer.bpe import train_tokenizer_on_files

        settings = self.settings.tokenizer
        section = settings.model_dump(exclude={"engine"})
        if settings.path is not None:
            given = Path(settings.path)

            def copy(folder: Path) -> None:
                shutil.copyfile(given, folder / f"tokenizer{given.suffix}")

            return self.runner.run(Stage("tokenizer", section, {"file": sha256_of(given)}, copy))

        def build(folder: Path) -> None:
            total_bytes = tally_sum(before.tally("kept"))["bytes"]
            path = folder / "tokenizer.model"
            train_tokenizer_on_files(stage_files(before.folder / "train"), settings, total_bytes, path)

        return self._after(before, "tokenizer", section, build)

    def shards(self, before: Finished, tokenizer: Finished) -> Finished:
        """Tokens of both splits, and the validation texts for evaluation."""
        from data_pipeline.dataset.merge import MergeShards, plan_shards
        from data_pipeline.dataset.publish import write_validation_documents
        from data_pipeline.dataset.shards import MAX_DOMAINS, written_hashes
        from data_pipeline.dataset.tokenise import tokenise_pipeline
        from data_pipeline.tokenizer.engine import choose_engine
        from data_pipeline.tokenizer.interface import load_tokenizer
        from data_pipeline.tokenizer.self_check import adversarial_texts, sample_texts

        settings, domains = self.settings, sorted(tally_by(before.tally("kept"), 0))
        if len(domains) > MAX_DOMAINS:
            raise BadInputError(f"the documents have {len(domains)} domains, at most {MAX_DOMAINS} can be kept")
        model = tokenizer_file(tokenizer)
        loaded = load_tokenizer(model, settings.tokenizer.end_token)

        def build(folder: Path) -> None:
            texts = [*adversarial_texts(loaded), *sample_texts(stage_files(before.folder / "train"))]
            choice = choose_engine(loaded, texts, settings.tokenizer.engine)
            self.runner.reporter.line("encoder", choice.describe())
            (folder / "tallies").mkdir()
            write_json_atomically(folder / "tallies" / "encoder.json", dataclasses.asdict(choice))
            for name in SPLITS:
                files = stage_files(before.folder / name)
                pieces, tallies = folder / "scratch" / name, folder / "tallies" / name
                pipeline = tokenise_pipeline(files, pieces, tallies, model, loaded.end_id, choice.name, domains)
                self.executor.run(pipeline, len(files), folder / "logs" / f"tokenise_{name}")
                written = [pieces / f"{rank:05d}.bin" for rank in range(len(files))]
                plan = plan_shards(written, settings.shards.max_tokens)
                merge = MergeShards(plan, folder / name, loaded.vocab_size)
                self.executor.run([merge], len(plan), folder / "logs" / f"merge_{name}")
            size = write_validation_documents(stage_files(before.folder / "validation"), folder / "documents.jsonl.gz")
            write_json_atomically(folder / "gzip9.json", size)

        def hashes(folder: Path) -> dict[str, str]:
            return {f"{name}/{file}": value for name in SPLITS for file, value in written_hashes(folder / name).items()}

        inputs = {before.folder.name.split("-")[0]: before.digest, "tokenizer": tokenizer.digest}
        section = [settings.shards.model_dump(), loaded.library, loaded.end_id, domains]
        input_bytes = tally_sum(before.tally("kept"))["bytes"]
        watch = ("validation", "train")
        return self.runner.run(Stage("shards", section, inputs, build, watch, input_bytes, hashes))

    def _after(self, before: Finished, name: str, section: Any, build: Any, watch: Sequence[str] = ()) -> Finished:
        kept = tally_sum(before.tally("kept"))
        if not kept["documents"]:
            raise BadInputError(f"{name}: no document is left; " + EMPTY_REMEDY.format(folder=before.folder))
        return self.runner.run(Stage(name, section, {"before": before.digest}, build, watch, kept["bytes"]))


def tokenizer_file(finished: Finished) -> Path:
    """The one file of a finished tokenizer stage, ``.model`` or ``.json``."""
    return next(finished.folder.glob("tokenizer.*"))


def check_given_tokenizer(settings: TokenizerSettings, reporter: Reporter) -> None:
    """Refuse a given tokenizer that cannot be used, before any work; say what it loses when that is accepted."""
    from data_pipeline.tokenizer.interface import load_tokenizer
    from data_pipeline.tokenizer.self_check import check_tokenizer

    if settings.path is not None:
        lost = check_tokenizer(
            load_tokenizer(Path(settings.path), settings.end_token), settings.path, settings.allow_lossy
        )
        if lost is not None:
            reporter.line("tokenizer", f"{settings.path}: does not give every text back: {lost}")


def prepare(settings: DataSettings, executor: Executor, reporter: Reporter) -> Path:
    """Run every stage that is needed and publish the data set; returns its folder."""
    from data_pipeline.dataset.publish import build_manifest, is_published, publish
    from data_pipeline.report.account import make_report
    from data_pipeline.report.content import collect
    from data_pipeline.report.page import render_page

    check_given_tokenizer(settings.tokenizer, reporter)
    if settings.dedup.index is not None:
        check_index_target(Path(settings.dedup.index), settings.name)
    check_evaluation_sets(settings.decontamination)
    tables = find_files(settings.sources, settings.inputs)
    for line in describe_files(tables):
        reporter.line("inputs", line)
    output = Path(settings.output)
    try:
        runner = StageRunner(output / ".stages", reporter)
    except OSError as error:
        raise BadInputError(f"output = {settings.output!r}: cannot be created ({error.strerror})") from None
    with said_in_one_line(output), runner.lock():
        run = Preparation(settings, executor, runner)
        documents = cleaned = run.clean(tables)
        removals: dict[str, Finished] = {}
        if settings.dedup.exact:
            documents = removals["exact"] = run.exact(documents)
        if settings.dedup.minhash:
            documents = removals["minhash"] = run.minhash(documents)
        if settings.dedup.sentences:
            documents = removals["sentences"] = run.sentences(documents)
        keys = dict(removals)
        if settings.decontamination.sets:
            documents = removals["decontamination"] = run.decontaminate(documents)
        split = run.split(documents)
        tokenizer = run.tokenizer(split)
        shards = run.shards(split, tokenizer)
        domains = sorted(tally_by(split.tally("kept"), 0))
        left_out: dict[str, Any] = {"name": True, "output": True, "execution": True, "tokenizer": {"engine"}}
        left_out["dedup"] = {"index"}
        table = cleaned.folder / "files.json"
        manifest, places = build_manifest(
            settings.name,
            shards.folder,
            tokenizer_file(tokenizer),
            domains,
            digest_of(settings.model_dump(exclude=left_out)),
            settings.tokenizer.end_token,
            table if table.is_file() else None,
        )
        if is_published(manifest, places, output):
            reporter.line("publish", "already done")
        else:
            names = [table.name for table in tables]
            report = make_report(cleaned, list(removals.values()), split, shards, names)
            tokens = {
                name: {domain: entry.tokens for domain, entry in getattr(manifest, name).by_domain.items()}
                for name in SPLITS
            }
            page = render_page(collect(settings.name, cleaned, list(removals.values()), report, tokens))
            publish(manifest, places, report, output, page)
            provenance = "" if manifest.sources else "; documents' provenance was not kept"
            reporter.line("publish", f"manifest {manifest.fingerprint[:16]}{provenance}")
        run.write_index(keys)
        runner.prune()
    for name, entry in (("train", manifest.train), ("validation", manifest.validation)):
        total = entry.total
        ratio = total.utf8_bytes / total.tokens
        reporter.line(name, f"{total.documents:,} documents, {total.tokens:,} tokens, {ratio:.2f} bytes a token")
    bits = 8 * manifest.validation_documents.gzip9_bytes / manifest.validation.total.utf8_bytes
    reporter.line("ready", f"{output}: vocabulary {manifest.vocab_size}; gzip -9 of validation: {bits:.3f} bits a byte")
    return output
