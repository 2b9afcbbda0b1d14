"""The story of one preparation: from raw files to a published data set, stage by stage.

Each stage reads the documents of the one before and is skipped when it has been finished under the same settings and
content (``execution/stages.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.config import DataSettings
from data_pipeline.execution.executors import Executor
from data_pipeline.execution.progress import Reporter
from data_pipeline.execution.stages import Finished, Stage, StageRunner, digest_of
from data_pipeline.execution.tally import Tally, add_to_tally, tally_sum
from data_pipeline.inputs.readers import InputFile, find_source_files, stage_files
from data_pipeline.split import SPLITS
from launch.files import sha256_of, write_json_atomically
from launch.settings import BadInputError

EMPTY_REMEDY = "the corpus is too small or the quality section too strict; report of drops: {folder}/tallies"


class Preparation:
    """One run of the pipeline: the settings, and each stage as a method that returns what is finished."""

    def __init__(self, settings: DataSettings, executor: Executor, runner: StageRunner) -> None:
        self.settings = settings
        self.executor = executor
        self.runner = runner

    def clean(self, files: Sequence[InputFile]) -> Finished:
        """Raw files to clean documents."""
        from data_pipeline.clean.pipeline import clean_pipeline

        settings = self.settings

        def build(folder: Path) -> None:
            pipeline = clean_pipeline(files, settings.clean, settings.quality, folder)
            self.executor.run(pipeline, len(files), folder / "logs")

        facts = {
            f"{index:05d} {file.path.name} {file.domain} {file.text_key} {file.id_key}": sha256_of(file.path)
            for index, file in enumerate(files)
        }
        sections = [settings.clean.model_dump(), settings.quality.model_dump()]
        return self.runner.run(Stage("clean", sections, facts, build, watch=("read", "kept")))

    def exact(self, before: Finished) -> Finished:
        """Identical documents once."""
        from data_pipeline.dedup.pipeline import remove_exact_duplicates

        def build(folder: Path) -> None:
            remove_exact_duplicates(self.executor, stage_files(before.folder / "documents"), folder)

        return self._after(before, "exact", None, build, watch=("signed", "kept"))

    def minhash(self, before: Finished) -> Finished:
        """Nearly identical documents once."""
        from data_pipeline.dedup.pipeline import remove_near_duplicates

        def build(folder: Path) -> None:
            files = stage_files(before.folder / "documents")
            remove_near_duplicates(self.executor, files, folder, self.settings.dedup)

        section = self.settings.dedup.model_dump(exclude={"exact", "minhash"})
        return self._after(before, "minhash", section, build, watch=("signed", "kept"))

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
        """The tokenizer's model, from training text only."""
        from data_pipeline.tokenizer.bpe import train_tokenizer_on_files

        def build(folder: Path) -> None:
            total_bytes = tally_sum(before.tally("kept"))["bytes"]
            path = folder / "tokenizer.model"
            train_tokenizer_on_files(stage_files(before.folder / "train"), self.settings.tokenizer, total_bytes, path)

        return self._after(before, "tokenizer", self.settings.tokenizer.model_dump(), build)

    def shards(self, before: Finished, tokenizer: Finished) -> Finished:
        """Tokens of both splits, and the validation texts for evaluation."""
        from data_pipeline.dataset.publish import write_validation_documents
        from data_pipeline.dataset.shards import shard_pipeline

        domains = sorted(before.tally("kept"))

        def build(folder: Path) -> None:
            for name in SPLITS:
                files = stage_files(before.folder / name)
                model = tokenizer.folder / "tokenizer.model"
                pipeline = shard_pipeline(files, folder, name, model, domains, self.settings.shards)
                self.executor.run(pipeline, len(files), folder / "logs" / name)
            size = write_validation_documents(stage_files(before.folder / "validation"), folder / "documents.jsonl.gz")
            write_json_atomically(folder / "gzip9.json", size)

        inputs = {before.folder.name.split("-")[0]: before.digest, "tokenizer": tokenizer.digest}
        section = [self.settings.shards.model_dump(), domains]
        input_bytes = tally_sum(before.tally("kept"))["bytes"]
        return self.runner.run(Stage("shards", section, inputs, build, ("validation", "train"), input_bytes))

    def _after(self, before: Finished, name: str, section: Any, build: Any, watch: Sequence[str] = ()) -> Finished:
        kept = tally_sum(before.tally("kept"))
        if not kept["documents"]:
            raise BadInputError(f"{name}: no document is left; " + EMPTY_REMEDY.format(folder=before.folder))
        return self.runner.run(Stage(name, section, {"before": before.digest}, build, watch, kept["bytes"]))


def prepare(settings: DataSettings, executor: Executor, reporter: Reporter) -> Path:
    """Run every stage that is needed and publish the data set; returns its folder."""
    from data_pipeline.dataset.publish import build_manifest, is_published, publish

    files = find_source_files(settings.sources)
    output = Path(settings.output)
    try:
        runner = StageRunner(output / ".stages", reporter)
    except OSError as error:
        raise BadInputError(f"output = {settings.output!r}: cannot be created ({error.strerror})") from None
    with runner.lock():
        run = Preparation(settings, executor, runner)
        documents = cleaned = run.clean(files)
        removals = []
        if settings.dedup.exact:
            documents = run.exact(documents)
            removals.append(documents)
        if settings.dedup.minhash:
            documents = run.minhash(documents)
            removals.append(documents)
        split = run.split(documents)
        tokenizer = run.tokenizer(split)
        shards = run.shards(split, tokenizer)
        domains = sorted(split.tally("kept"))
        settings_hash = digest_of(settings.model_dump(exclude={"name", "output", "execution"}))
        manifest, sources = build_manifest(
            settings.name, shards.folder, tokenizer.folder / "tokenizer.model", domains, settings_hash
        )
        if is_published(manifest, output):
            reporter.line("publish", "already done")
        else:
            publish(manifest, sources, make_report(cleaned, removals, split, shards), output)
            reporter.line("publish", f"manifest {manifest.fingerprint[:16]}")
        runner.prune()
    for name, entry in (("train", manifest.train), ("validation", manifest.validation)):
        total = entry.total
        ratio = total.utf8_bytes / total.tokens
        reporter.line(name, f"{total.documents:,} documents, {total.tokens:,} tokens, {ratio:.2f} bytes a token")
    bits = 8 * manifest.validation_documents.gzip9_bytes / manifest.validation.total.utf8_bytes
    reporter.line("ready", f"{output}: vocabulary {manifest.vocab_size}; gzip -9 of validation: {bits:.3f} bits a byte")
    return output


def make_report(cleaned: Finished, removals: Sequence[Finished], split: Finished, shards: Finished) -> dict[str, Any]:
    """Every document accounted for: read = dropped (by reason and domain) + train + validation."""
    dropped: dict[str, Tally] = {}
    for stage in (cleaned, *removals):
        for folder in sorted((stage.folder / "tallies").glob("dropped*")):
            for key, counts in stage.tally(folder.name).items():
                reason, domain = key.split("\t")
                add_to_tally(dropped.setdefault(reason, {}), domain, counts["bytes"], counts["documents"])
    return {
        "read": cleaned.tally("read"),
        "dropped": dropped,
        "kept": split.tally("kept"),
        **{name: shards.tally(name) for name in SPLITS},
    }
