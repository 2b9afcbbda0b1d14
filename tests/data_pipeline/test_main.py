"""The pipeline as a whole: skipping, re-doing, determinism, accounting, and errors in one line with status 78."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataSettings
from data_pipeline.dataset.reader import open_dataset
from data_pipeline.execution import stages
from data_pipeline.main import main
from launch.settings import BadInputError, load_settings

SettingsFor = Callable[..., DataSettings]
RunPipeline = Callable[[DataSettings], list[str]]


NOT_STAGES = {"inputs", "quarantine", "encoder", "train", "validation", "ready"}


def done_again(lines: list[str]) -> set[str]:
    return {line.split()[0] for line in lines if "already done" not in line} - NOT_STAGES


def run_command(*arguments: str, cwd: Path, program: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program / "data_pipeline" / "main.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_every_text_comes_back_from_the_shards(small_dataset: Path) -> None:
    dataset = open_dataset(small_dataset, verify=True)
    held_out = list(dataset.validation_documents())
    decoded = [
        (dataset.tokenizer.decode(shard.document(index).tolist()), dataset.domains[shard.domain_ids[index]])
        for shard in dataset.split("validation").shards
        for index in range(shard.document_ends.size)
    ]
    assert decoded == [(document["text"], document["domain"]) for document in held_out]
    for stream in dataset.streams.values():
        for shard in stream.shards:
            for index in range(shard.document_ends.size):
                tokens = shard.document(index)
                assert tokens[-1] == dataset.manifest.end_token_id
                text = dataset.tokenizer.decode(tokens.tolist())
                assert len(text.encode()) == shard.utf8_bytes[index]


def test_no_text_is_in_both_splits_and_duplicates_are_gone(
    small_dataset: Path, small_documents: list[dict[str, Any]]
) -> None:
    dataset = open_dataset(small_dataset)
    texts = Counter(
        dataset.tokenizer.decode(shard.document(index).tolist())
        for stream in dataset.streams.values()
        for shard in stream.shards
        for index in range(shard.document_ends.size)
    )
    assert set(texts.values()) == {1}
    good = {document["text"] for document in small_documents[:200]}
    near = small_documents[8]["text"]
    assert len(texts) == 200
    assert {near} | set(texts) >= good  # of the near pair either may stay
    assert len({near, near + " One more river."} & set(texts)) == 1


def test_the_report_accounts_for_every_document_and_byte(small_dataset: Path) -> None:
    report = json.loads((small_dataset / "report.json").read_text())
    dropped = report["dropped"]
    assert {reason: sum(c["documents"] for c in tally.values()) for reason, tally in dropped.items()} == {
        "empty": 1,
        "too_short": 1,
        "exact_duplicate": 1,
        "near_duplicate": 1,
    }
    for domain, read in report["read"].items():
        for unit in ("documents", "bytes"):
            parts = [report["train"], report["validation"], *dropped.values()]
            assert read[unit] == sum(part.get(domain, {unit: 0})[unit] for part in parts)


def test_manifest_totals_are_sums_and_gzip_is_gzips(small_dataset: Path) -> None:
    dataset = open_dataset(small_dataset)
    for split in (dataset.manifest.train, dataset.manifest.validation):
        for unit in ("tokens", "documents", "utf8_bytes"):
            total = getattr(split.total, unit)
            assert total == sum(getattr(shard, unit) for shard in split.shards)
            assert total == sum(getattr(domain, unit) for domain in split.by_domain.values())
    assert len(dataset.manifest.train.shards) > 1
    text = "".join(document["text"] for document in dataset.validation_documents())
    assert len(text.encode()) == dataset.manifest.validation.total.utf8_bytes
    assert abs(len(gzip.compress(text.encode(), 9)) - dataset.manifest.validation_documents.gzip9_bytes) <= 16


def test_a_second_run_does_nothing_and_a_setting_redoes_only_what_follows(
    small_corpus: Path, tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    output = tmp_path / "data"
    run_pipeline(settings_for(small_corpus, output))
    first = open_dataset(output).fingerprint
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file() and path.name != "lock"}
    assert done_again(run_pipeline(settings_for(small_corpus, output))) == set()
    assert before == {path: path.stat().st_mtime_ns for path in before}

    larger = settings_for(small_corpus, output, tokenizer={"vocab_size": 430})
    assert done_again(run_pipeline(larger)) == {"tokenizer", "shards", "publish"}
    assert open_dataset(output, verify=True).vocab_size == 430
    # A setting that changes no document: the first stage runs, and what it hands on is recognised.
    looser = settings_for(
        small_corpus, output, tokenizer={"vocab_size": 430}, clean={"length": {"max_characters": 199_999}}
    )
    assert done_again(run_pipeline(looser)) == {"clean", "publish"}
    one_shard = settings_for(small_corpus, output, shards={"max_tokens": 10**9})
    assert done_again(run_pipeline(one_shard)) >= {"clean", "tokenizer", "shards", "publish"}
    assert len(list((output / "train").glob("*.bin"))) == 1, "shards of the earlier settings must go"
    assert open_dataset(output, verify=True).fingerprint != first
    assert len([path for path in (output / ".stages").iterdir() if path.is_dir()]) == 6


def test_damage_is_repaired_by_running_again(
    small_dataset: Path, small_corpus: Path, tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    output = tmp_path / "data"
    settings = settings_for(small_corpus, output)
    run_pipeline(settings)
    shard = output / "train" / "shard_00001.bin"
    os.truncate(shard, 100)
    with pytest.raises(BadInputError, match="truncated"):
        open_dataset(output)
    run_pipeline(settings)
    (output / "manifest.json").unlink()
    shutil.rmtree(next((output / ".stages").glob("split-*")) / "train")
    run_pipeline(settings)
    assert open_dataset(output, verify=True).fingerprint == open_dataset(small_dataset).fingerprint


def test_a_run_cut_off_in_any_stage_leaves_no_data_set_and_the_next_one_finishes(
    small_dataset: Path,
    small_corpus: Path,
    tmp_path: Path,
    settings_for: SettingsFor,
    run_pipeline: RunPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "data"
    settings = settings_for(small_corpus, output)
    original = stages._write_record
    for name in ("exact", "split", "shards"):
        with monkeypatch.context() as patch:

            def cut_off(folder: Path, key: str, hashes: Mapping[str, str], name: str = name) -> str:
                if folder.name.startswith(name):
                    raise KeyboardInterrupt
                return original(folder, key, hashes)

            patch.setattr(stages, "_write_record", cut_off)
            with pytest.raises(KeyboardInterrupt):
                run_pipeline(settings)
        assert not (output / "manifest.json").exists()
    assert done_again(run_pipeline(settings)) == {"shards", "publish"}
    assert open_dataset(output, verify=True).fingerprint == open_dataset(small_dataset).fingerprint
    assert not list((output / ".stages").glob("*.partial"))


def test_the_command_prepares_the_same_bytes_with_two_workers_and_says_so(
    small_dataset: Path, small_corpus: Path, tmp_path: Path, repository_root: Path
) -> None:
    config = tmp_path / "small.json"
    sections = {"split": {"validation_fraction": 0.2}, "tokenizer": {"vocab_size": 420}, "shards": {"max_tokens": 8000}}
    sources = [{"path": str(small_corpus)}]
    pieces = {"inputs": {"piece_bytes": 1}}
    config.write_text(json.dumps({"name": "small", "output": "out", "sources": sources, **pieces, **sections}))
    arguments = ("--config", str(config), "--set", "execution.workers=2")
    result = run_command(*arguments, cwd=tmp_path, program=repository_root)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (small_dataset / "manifest.json").read_bytes()
    assert result.stdout.splitlines()[-1].startswith("ready")
    logs = list((tmp_path / "out" / ".stages").glob("clean-*/logs/logs/task_*.log"))
    assert len(logs) == 3
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--set", 'sources=[{"path": "nowhere"}]'), "sources.0.path = 'nowhere': no such folder"),
        (("--set", "tokenizer.vocab_sise=5"), "did you mean vocab_size?"),
        (("verify", "nowhere"), "nowhere: no such folder, so no data set; prepare it with:"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_78(
    arguments: tuple[str, ...], problem: str, tmp_path: Path, repository_root: Path
) -> None:
    config = ("--config", str(repository_root / "configs" / "data" / "demo.json"))
    result = run_command(*config, *arguments, cwd=tmp_path, program=repository_root)
    assert result.returncode == 78
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_error_inside_a_worker_keeps_its_line(
    tmp_path: Path, repository_root: Path, small_documents: list[dict[str, Any]], corpus_writer: Callable[..., None]
) -> None:
    corpus_writer(tmp_path / "corpus", small_documents)
    (tmp_path / "corpus" / "part9.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    config = tmp_path / "bad.json"
    inputs = {"max_bad_records": 0}
    config.write_text(json.dumps({"name": "bad", "output": "out", "sources": [{"path": "corpus"}], "inputs": inputs}))
    result = run_command("--config", str(config), cwd=tmp_path, program=repository_root)
    assert result.returncode == 78, result.stderr
    assert "1 of 206 records are bad (1 not_json)" in result.stderr
    assert "the first: part9.jsonl, byte 17: is not JSON" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_corpus_without_usable_text_is_one_line(
    tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(BadInputError, match="no document is left"):
        run_pipeline(settings_for(tmp_path / "corpus", tmp_path / "out"))


def test_a_split_that_stays_empty_names_its_setting(
    small_corpus: Path, tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    settings = settings_for(small_corpus, tmp_path / "out", split={"validation_fraction": 1e-9})
    with pytest.raises(BadInputError, match=r"split\.validation_fraction = 1e-09: leaves no document for validation"):
        run_pipeline(settings)


def test_shards_are_not_read_again_to_be_hashed_and_the_digest_is_the_same(
    small_dataset: Path,
    small_corpus: Path,
    tmp_path: Path,
    settings_for: SettingsFor,
    run_pipeline: RunPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[str] = []
    original = stages.sha256_of
    monkeypatch.setattr(stages, "sha256_of", lambda path: hashed.append(path.name) or original(path))
    run_pipeline(settings_for(small_corpus, tmp_path / "data"))
    assert "documents.jsonl.gz" in hashed
    assert not [name for name in hashed if name.startswith("shard_") and not name.endswith(".json")]
    (record,) = (tmp_path / "data" / ".stages").glob("shards-*/DONE.json")
    files = [path for path in record.parent.rglob("*") if path.is_file()]
    names = {str(path.relative_to(record.parent)): path for path in files}
    outputs = {name: path for name, path in names.items() if name.split("/")[0] not in ("logs", "tallies", "DONE.json")}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in outputs.items()}
    independent = stages.digest_of(hashes)
    assert json.loads(record.read_text())["digest"] == independent


def test_two_runs_on_one_output_do_not_mix_and_a_killed_one_holds_nothing(
    repository_root: Path, small_corpus: Path, tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    program = (
        "import sys; from pathlib import Path; from data_pipeline.execution.progress import Reporter;"
        "from data_pipeline.execution.stages import StageRunner\n"
        "with StageRunner(Path(sys.argv[1]), Reporter()).lock(): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out" / ".stages")]
    settings = settings_for(small_corpus, tmp_path / "out")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=repository_root, text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInputError, match="another preparation"):
            run_pipeline(settings)
        other.kill()
    run_pipeline(settings)


def test_a_shard_edited_after_publication_is_made_again(
    small_corpus: Path, tmp_path: Path, settings_for: Callable[..., DataSettings], run_pipeline: Any
) -> None:
    output = tmp_path / "data"
    settings = settings_for(small_corpus, output)
    run_pipeline(settings)
    shard = next((output / "train").glob("*.bin"))
    before, content = shard.stat(), shard.read_bytes()
    with shard.open("r+b") as file:  # a link to the stage's file, which changes too
        file.write(bytes(byte ^ 1 for byte in content[:2]))
    os.utime(shard, (before.st_atime, before.st_mtime + 60))
    with pytest.raises(BadInputError, match=r"wrong sha256.*prepare the data set again"):
        open_dataset(output, verify=True)
    run_pipeline(settings)
    open_dataset(output, verify=True)
    assert shard.read_bytes() == content


def test_torch_and_word_models_are_never_imported(repository_root: Path) -> None:
    program = (
        "import sys; import data_pipeline.main, data_pipeline.clean.pipeline, data_pipeline.dedup.minhash;"
        "import data_pipeline.dataset.publish;"
        "print([name for name in ('torch', 'spacy', 'nltk') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_demo_settings_and_its_corpus_are_there_with_their_licences(repository_root: Path) -> None:
    settings = load_settings(DataSettings, repository_root / "configs" / "data" / "demo.json")
    folder = repository_root / settings.sources[0].path
    files = sorted(folder.glob(settings.sources[0].pattern))
    readme = (folder / "README.md").read_text()
    assert len(files) == 5
    assert all(path.name in readme for path in files)
    assert sum(path.stat().st_size for path in files) < 6_000_000
