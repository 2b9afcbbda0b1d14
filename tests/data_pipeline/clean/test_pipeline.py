"""The stage as a whole: every document is kept or dropped under a name, each source by its own settings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.clean.classifier import TrainingSettings, train_classifier
from data_pipeline.clean.pipeline import DocumentCleaner, clean_facts, clean_pipeline, length_bin
from data_pipeline.clean.samples import KEPT, read_samples
from data_pipeline.clean.settings import CleanSettings
from data_pipeline.config import DataSettings
from data_pipeline.execution.tally import read_tallies, tally_sum
from data_pipeline.inputs.readers import read_documents, stage_files
from launch.settings import BadInputError, parse_settings

PROSE = (
    "The captain wrote a letter every evening, and the boy would carry it to the harbour before the gates were shut. "
    "Nobody knew what was in those letters. It was said that they were for a brother who had gone to the north with "
    "the fleet and had not been heard of since. When the winter came the boy asked him. "
    "He looked up from the table, smiled, and said that some things are to be sent and not to be answered. "
    "After that they were friends."
)
HTML = f"<html><body><main><p>{PROSE}</p></main><footer>Imprint</footer></body></html>"


class Given(PipelineStep):
    """A reader of documents that a test made: piece ``rank`` of ``pieces``."""

    def __init__(self, pieces: list[list[Document]]) -> None:
        super().__init__()
        self.pieces = pieces

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from self.pieces[rank]


def document(text: str, source: int = 0, **metadata: Any) -> Document:
    values = {"domain": f"d{source}", "source": "made", "origin": {"source": source, "file": 0, "position": 0}}
    return Document(text=text, id=f"{source}/{len(text)}", metadata={**values, **metadata})


def run(pieces: list[list[Document]], settings: list[CleanSettings], folder: Path) -> list[Document]:
    for rank in range(len(pieces)):
        data = None
        for step in clean_pipeline(Given(pieces), settings, folder):
            data = step(data, rank, len(pieces))
        assert data is not None
        list(data)
    return [document for file in stage_files(folder / "documents") for document in read_documents(file)]


def reasons(folder: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for tally in sorted((folder / "tallies").glob("dropped_*")):
        for key, counts in read_tallies(tally).items():
            found[key.split("\t")[0]] += counts["documents"]
    return dict(found)


def test_every_document_is_kept_or_dropped_under_a_name(tmp_path: Path) -> None:
    web = CleanSettings(profile="web")
    documents = [
        document(PROSE, url="https://example.com"),
        document(HTML, media_type="text/html"),
        document("<html><body></body></html>", media_type="text/html"),
        document(""),
        document("Short."),
        document("Der Kapit\u00e4n schrieb jeden Abend einen Brief, und der Junge trug ihn zum Hafen. " * 6),
        document("the of and to " * 60),
        document(PROSE + " {"),
        document(PROSE.replace(". ", ".\nMenu\nHome\n")),
        document(PROSE.replace(" ", " # ")),
    ]
    kept = run([documents[:5], documents[5:], []], [web], tmp_path)
    assert [item.text for item in kept] == [PROSE, PROSE]
    assert kept[0].metadata["url"] == "https://example.com"
    assert kept[0].metadata["origin"] == {"source": 0, "file": 0, "position": 0}
    assert kept[0].metadata["language"] == "en"
    dropped = reasons(tmp_path)
    expected = {"extraction_empty", "empty", "too_short", "language", "curly_bracket", "gopher_too_many_hashes"}
    assert expected < set(dropped)
    assert sum(dropped.values()) + len(kept) == len(documents)
    assert tally_sum(read_tallies(tmp_path / "tallies" / "read"))["documents"] == len(documents)
    assert tally_sum(read_tallies(tmp_path / "tallies" / "kept"))["documents"] == len(kept)
    assert len(stage_files(tmp_path / "documents")) == 3, "one file a piece, also when it is empty"
    assert read_tallies(tmp_path / "tallies" / "lengths") == {
        f"{length_bin(len(PROSE))}\td0": {"documents": 2, "bytes": 2 * len(PROSE)}
    }
    languages = read_tallies(tmp_path / "tallies" / "languages")
    assert languages["de\td0"]["documents"] == 1


def test_each_source_follows_its_own_settings(tmp_path: Path) -> None:
    code = "def f(values):\n    # the of and to\n    return {key: value * 2 for key, value in values.items()}\n" * 2
    code = "\n".join(f"    {line}  # {number}" for number, line in enumerate(code.split("\n")))
    settings = [CleanSettings(profile="web"), CleanSettings(profile="code")]
    kept = run([[document(code, 0), document(code, 1)]], settings, tmp_path)
    assert [item.metadata["domain"] for item in kept] == ["d1"]
    assert kept[0].text == code


def test_settings_are_the_profile_with_what_is_written_beside_it() -> None:
    web, mixed = (
        CleanSettings(profile="web"),
        CleanSettings.model_validate({"profile": "web", "gopher_quality": {"min_words": 7}, "c4": None, "fineweb": {}}),
    )
    assert web.c4 is not None
    assert not web.c4.terminal_punctuation
    assert mixed.c4 is None
    assert mixed.gopher_quality is not None
    assert mixed.gopher_quality.model_dump(exclude={"min_words"}) == web.gopher_quality.model_dump(  # type: ignore
        exclude={"min_words"}
    )
    assert mixed.gopher_quality.min_words == 7
    assert mixed.fineweb == web.fineweb
    # What was resolved, written down and read again is the same.
    assert CleanSettings.model_validate_json(mixed.model_dump_json()) == mixed


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"profile": "poems"}, "profile"),
        ({"gopher_quality": {"min_wrods": 3}}, "gopher_quality.min_wrods"),
        ({"gopher_repetition": {"max_duplicate_lines": 0}}, "gopher_repetition.max_duplicate_lines"),
        ({"length": {"min_characters": 50, "max_characters": 10}}, "length.max_characters = 10: is below"),
        ({"language": {"keep": ["english"]}}, "language.keep.0"),
        ({"quality": {}}, "unknown key"),
        ([1], "clean"),
    ],
)
def test_mistakes_in_settings_name_their_key(values: Any, problem: str) -> None:
    settings = {"name": "n", "output": "o", "sources": [{"path": "p"}]}
    with pytest.raises(BadInputError, match=re.escape(problem)):
        parse_settings(DataSettings, {**settings, "clean": values}, "f.json")
    in_source = {**settings, "sources": [{"path": "p", "clean": values}]}
    with pytest.raises(BadInputError, match=re.escape(problem)):
        parse_settings(DataSettings, in_source, "f.json")


def test_a_learned_judge_drops_and_its_content_is_in_the_key(tmp_path: Path) -> None:
    good = [PROSE.replace("captain", f"captain {word}") for word in "abcdefghijklmno"]
    bad = [text.replace("the", "buy").replace("and", "casino") for text in good]
    models = [tmp_path / name for name in ("one.bin", "same.bin", "other.bin")]
    for seed, path in zip((1, 1, 2), models, strict=True):
        train_classifier(good, bad, TrainingSettings(bits=10, seed=seed), path)
    settings = [CleanSettings.model_validate({"classifier": {"path": str(path)}}) for path in models]
    kept = run([[document(good[0]), document(bad[0])]], settings[:1], tmp_path / "run")
    assert [item.text for item in kept] == [good[0]]
    assert kept[0].metadata["quality_score"] > 0.5
    assert reasons(tmp_path / "run") == {"quality_score": 1}
    one, same, other = (clean_facts([item]) for item in settings)
    assert one == same
    assert one != other
    models[0].unlink()
    with pytest.raises(BadInputError, match="train-classifier"):
        clean_facts(settings[:1])
    with pytest.raises(BadInputError, match="train-classifier"):
        DocumentCleaner(settings[0])


def test_personal_information_goes_from_text_and_from_samples(tmp_path: Path) -> None:
    text = PROSE + " Write to ann@mail.com or 8.8.8.8."
    kept = run([[document(text), document("bob@mail.com")]], [CleanSettings()], tmp_path)
    assert "ann@mail.com" not in kept[0].text
    assert "8.8.8.8" not in kept[0].text
    samples = json.dumps([vars(sample) for group in read_samples(tmp_path / "samples").values() for sample in group])
    assert "@mail.com" not in samples
    assert "example" in samples


def test_samples_do_not_depend_on_how_the_work_is_divided(tmp_path: Path) -> None:
    documents = [f"{PROSE} Number {number}." for number in range(40)] + [f"x{number}" for number in range(20)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run([[document(text) for text in documents]], [CleanSettings()], whole)
    run([[document(text) for text in documents[part::3]] for part in range(3)], [CleanSettings()], parts)
    samples = read_samples(whole / "samples")
    assert samples == read_samples(parts / "samples")
    assert {reason: len(found) for reason, found in samples.items()} == {KEPT: 4, "too_short": 4}
