"""The command: a run to a folder and back without losing a bit, in little memory; mistakes end in one line."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_source import made_model, made_source
from safetensors.torch import load_file

from data_pipeline.tokenizer.bpe import END_ID, train_tokenizer
from launch.files import sha256_of, write_json_atomically
from launch.settings import BadInputError, exit_with_status, parse_settings
from model import IceConfig, IceModel
from model.expert_parallel import SELECTION_BIAS
from pretrain.checkpoint import RunIdentity, TrainingState
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.layout import BIASES, ENGINE, STATE, WEIGHTS, step_folder_name
from pretrain.checkpoint.manifest import write_manifest
from pretrain.checkpoint.state import encode_state, read_record, require_same_identity
from pretrain.config import TrainingConfig
from pretrain.export import main, parse_size
from pretrain.generate import generate_text, parse_arguments
from pretrain.interchange.hugging_face import RECORD
from pretrain.interchange.initial_weights import open_initial
from pretrain.interchange.weight_source import open_checkpoint
from pretrain.run_tokenizer import keep_tokenizer
from pretrain.weights import INDEX, safetensors_file

LINES = [f"The captain of ship {number} wrote to the harbour about {number * 7} barrels." for number in range(200)]
VOCABULARY = 352


def small(**fields: Any) -> IceConfig:
    values = IceConfig(tie_embeddings=True, recurrent_layers=2).scaled_down().model_dump()
    return IceConfig.model_validate(values | {"vocab_size": VOCABULARY, "dim": 32} | fields)


def write_run(run: Path, model: IceModel, dtype: str = "fp32", zero3_ranks: int = 0) -> Path:
    """A run directory with one checkpoint, as training leaves it; its checkpoint. Without plain weights if sharded."""
    checkpoint = run / "checkpoints" / step_folder_name(3)
    checkpoint.mkdir(parents=True)
    if zero3_ranks:
        write_zero3(checkpoint / ENGINE, model, zero3_ranks)
    else:
        made_source(model, checkpoint / WEIGHTS)
    biases = {name: bias for name, bias in model.named_buffers() if name.endswith(SELECTION_BIAS)}
    with (checkpoint / BIASES).open("wb") as file:
        safetensors_file(biases)(file)
    topology = {"ranks": max(zero3_ranks, 1), "zero_stage": 3, "expert_parallel_size": 1, "dtype": dtype}
    identity = RunIdentity(model.config.model_dump(mode="json"), {}, topology)
    (checkpoint / STATE).write_bytes(encode_state(TrainingState(3, 96, 3072, None), identity))
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    entries = {str(path.relative_to(checkpoint)): FileEntry(sha256_of(path), path.stat().st_size) for path in files}
    write_manifest(checkpoint, entries)
    values = {
        "run": {"name": run.name, "dir": str(run.parent)},
        "model": model.config.model_dump(mode="json"),
        "data": {"path": "nowhere", "sequence_length": 32},
        "loop": {"mean_loops": 3},
    }
    config = parse_settings(TrainingConfig, values, "test")
    write_json_atomically(run / "config.json", config.model_dump(mode="json"))
    content = train_tokenizer(LINES, VOCABULARY)
    (run / "made.model").write_bytes(content)
    dataset: Any = SimpleNamespace(
        tokenizer_suffix=".model",
        tokenizer_sha256=sha256_of(run / "made.model"),
        tokenizer_bytes=content,
        end_token_id=END_ID,
        vocab_size=VOCABULARY,
    )
    keep_tokenizer(dataset, run)
    return checkpoint


def write_zero3(folder: Path, model: IceModel, ranks: int) -> None:
    """A dense model in ZeRO-3's files: two groups of parameters, each parameter padded and cut into equal parts."""
    folder.mkdir()
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    groups = [dict(named[0::2]), dict(named[1::2])]
    for rank in range(ranks):
        flat = []
        for group in groups:
            parts = []
            for parameter in group.values():
                each = -(-parameter.numel() // ranks)
                padded = torch.nn.functional.pad(
                    parameter.reshape(-1), (0, each * ranks - parameter.numel()), value=9e9
                )
                parts.append(padded[rank * each : (rank + 1) * each])
            flat.append(torch.cat(parts))
        shapes = [{name: parameter.shape for name, parameter in group.items()} for group in groups]
        torch.save({"param_shapes": shapes}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {"optimizer_state_dict": {"fp32_flat_groups": flat}}
        torch.save(state, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_again_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = made_model(small()).to(dtype)
    for module in model.modules():
        if hasattr(module, SELECTION_BIAS):
            module.register_buffer(SELECTION_BIAS, getattr(module, SELECTION_BIAS).float())
    run, imported = tmp_path / "a_run", tmp_path / "imported"
    checkpoint = write_run(run, model, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    assert main(["--run", str(run), "--out", str(tmp_path / "out"), "--shard-size", "60KB"]) == 0
    assert (tmp_path / "out" / INDEX).is_file()
    assert main(["--import", str(tmp_path / "out"), "--run", str(imported)]) == 0
    assert_same(weights_in(imported / "checkpoints" / "step_00000003" / WEIGHTS), weights_in(checkpoint / WEIGHTS))
    assert main(["--run", str(imported), "--out", str(tmp_path / "again"), "--shard-size", "60KB"]) == 0
    once, twice = (json.loads((tmp_path / name / RECORD).read_text()) for name in ("out", "again"))
    differ = {name for name, entry in once["files"].items() if twice["files"].get(name) != entry}
    assert differ == {"README.md"}, "it has the run's name"
    assert {**once, "run": "", "files": {}} == {**twice, "run": "", "files": {}}
    arguments = ["--prompt", "The captain", "--temperature", "0", "--max-new-tokens", "8"]
    texts = [generate_text(parse_arguments(["--run", str(each), *arguments])) for each in (run, imported)]
    assert texts[0] == texts[1]
    assert (imported / "tokenizer" / "tokenizer.model").read_bytes() == (run / "made.model").read_bytes()


def test_an_imported_run_is_started_from_and_not_resumed(tmp_path: Path) -> None:
    model = made_model(small())
    write_run(tmp_path / "a_run", model)
    main(["--run", str(tmp_path / "a_run"), "--out", str(tmp_path / "out")])
    main(["--import", str(tmp_path / "out"), "--run", str(tmp_path / "new"), "--set", "optim.lr=0.5"])
    assert json.loads((tmp_path / "new" / "config.json").read_text())["optim"]["lr"] == 0.5
    checkpoint = tmp_path / "new" / "checkpoints" / "step_00000003"
    with pytest.raises(BadInputError, match=r"was imported and holds weights only.*run.init_from = .*/new$"):
        require_same_identity(checkpoint, read_record(checkpoint), RunIdentity({}, {}, {}), ())
    for path in (tmp_path / "a_run", tmp_path / "out", tmp_path / "new", checkpoint):
        source = open_initial(path, model.config)
        with torch.no_grad():
            assert torch.equal(source.load()(torch.arange(8).view(1, 8), 2), model(torch.arange(8).view(1, 8), 2)), path
    with pytest.raises(BadInputError, match=r"run.init_from = .*: is no run directory, checkpoint or exported folder"):
        open_initial(tmp_path, model.config)


def test_zero3_partitions_are_put_together_in_order(tmp_path: Path) -> None:
    model = made_model(small(n_experts=0))
    checkpoint = write_run(tmp_path / "a_run", model, zero3_ranks=3)
    source = open_checkpoint(checkpoint)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(source.load()(ids, 3), model(ids, 3))
    options = ["--run", str(tmp_path / "a_run"), "--temperature", "0", "--max-new-tokens", "4", "--prompt", "The"]
    assert generate_text(parse_arguments(options)).startswith("The"), "a run without plain weights generates too"
    assert main(["--run", str(tmp_path / "a_run"), "--out", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    exported = weights_in(tmp_path / "out")
    assert {name.removeprefix("model.") for name in exported} == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(exported[f"model.{name}"], parameter.bfloat16())


@contextmanager
def peak_of_private_memory() -> Iterator[list[int]]:
    """By how many bytes this process's own memory (files that are mapped do not count) grows at most inside."""

    def private_bytes() -> int:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return int(match[1]) * 1024

    gc.collect()
    before, highest, done = private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], private_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("form", ["weights", "sharded"])
def test_memory_stays_below_the_model(tmp_path: Path, form: str) -> None:
    config = small(vocab_size=2**17, dim=128, tie_embeddings=False, n_experts=0)
    model = made_model(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 120 * 2**20
    write_run(tmp_path / "a_run", model, zero3_ranks=2 if form == "sharded" else 0)
    del model
    arguments = ["--run", str(tmp_path / "a_run"), "--out", str(tmp_path / "out"), "--no-tokenizer", "--form", form]
    with peak_of_private_memory() as highest:
        assert main(arguments) == 0
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > size
    assert highest[0] < size / 3, f"{highest[0] / 2**20:.0f} MiB for a model of {size / 2**20:.0f} MiB"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    write_run(tmp_path / "a_run", made_model(small()))
    main(["--run", str(tmp_path / "a_run"), "--out", str(tmp_path / "out")])
    return tmp_path / "out"


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line of stderr of a command that ends with status 78."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        exit_with_status(lambda: main(list(arguments)))
    assert left.value.code == 78
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_end_in_one_line(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out, new = str(tmp_path / "a_run"), str(exported), str(tmp_path / "new")
    assert "is there already" in one_line(capsys, "--run", run, "--out", out)
    assert "not a run directory" in one_line(capsys, "--run", new, "--out", out)
    assert "name --out DIR to export" in one_line(capsys, "--run", run)
    assert "--shard-size 5 bananas: must be a size" in one_line(
        capsys, "--run", run, "--out", new, "--shard-size", "5 bananas"
    )
    assert "--loops 0" in one_line(capsys, "--run", run, "--out", new, "--loops", "0")
    assert "name a --step whose checkpoint is intact" in one_line(capsys, "--run", run, "--out", new, "--step", "4")
    assert "not the weights of its configuration: missing" in one_line(
        capsys, "--run", run, "--out", new, "--form", "sharded"
    )
    assert "make its universal form first: python launch/reshape.py --run" in one_line(
        capsys, "--run", run, "--out", new, "--form", "universal"
    )
    assert "is there already" in one_line(capsys, "--import", out, "--run", run)
    assert "no exported model" in one_line(capsys, "--import", run + "/tokenizer", "--run", new)
    assert "only ice can be imported" in one_line(capsys, "--import", run, "--run", new)
    assert not Path(new).exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_folder_that_was_changed_is_not_imported(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = exported / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    new = str(tmp_path / "new")
    assert "model.safetensors: is missing or not what ice_export.json records" in one_line(
        capsys, "--import", str(exported), "--run", new
    )
    record = json.loads((exported / RECORD).read_text())
    record["files"] = {"../a_run/config.json": record["files"]["config.json"]}
    (exported / RECORD).write_text(json.dumps(record))
    assert "does not name anything inside" in one_line(capsys, "--import", str(exported), "--run", new)
    record["files"], record["tokenizer"]["file"] = {}, "/etc/passwd"
    (exported / RECORD).write_text(json.dumps(record))
    assert "does not name anything inside" in one_line(capsys, "--import", str(exported), "--run", new)
    (exported / RECORD).unlink()
    assert main(["--import", str(exported), "--run", new]) == 0, "without a record, as transformers saves it"
    assert (Path(new) / "tokenizer" / "tokenizer.json").is_file()


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a_run", made_model(small()))
    shutil.rmtree(tmp_path / "a_run" / "tokenizer")
    with pytest.raises(BadInputError, match="nowhere"):
        main(["--run", str(tmp_path / "a_run"), "--out", str(tmp_path / "out")])

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("pretrain.interchange.hugging_face.write_files", full)
    with pytest.raises(BadInputError, match=r"out: No space left on device"):
        main(["--run", str(tmp_path / "a_run"), "--out", str(tmp_path / "out"), "--no-tokenizer"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_run"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700", 700), ("2kb", 2000)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size
