"""One sbatch command from a script and a site; and every script fits its configuration."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.settings import BadInputError, load_settings
from launch.submit import Resources, Site, main, ranges, read_resources, render, training_scripts
from launch.sweep import main as run_sweep
from launch.sweeping.settings import SweepSettings
from model.variants import VARIANTS
from pretrain.config import TrainingConfig, check_topology

FAKE_SBATCH = """#!/bin/bash
printf '%s\\0' "$PWD" "$ICE_CONTAINER_ARGS" "$NCCL_IB_HCA" "$@" >"$SEEN"
exit 3
"""


def write_site(folder: Path, **values: object) -> Path:
    path = folder / "site.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", training_scripts())
def test_a_script_has_the_ranks_that_its_configuration_needs(name: str, repository_root: Path) -> None:
    script = repository_root / "slurm" / f"{name}.sh"
    config = load_settings(TrainingConfig, repository_root / "configs" / f"{name}.json")
    resources = read_resources(script)
    check_topology(config, resources.ranks, name)
    text = script.read_text()
    assert f"--gpus-per-node={resources.tasks_per_node}\n" in text
    assert f"on {resources.nodes} node" in text.splitlines()[1]
    assert "Your site:" in text.splitlines()[2]
    assert text.count("\ntrain ") == 1
    assert f"\ntrain configs/{name}.json " in text
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@300"):
        assert f"#SBATCH {option}\n" in text


def test_every_variant_has_a_script() -> None:
    assert set(training_scripts()) == {name for name in VARIANTS if name != "ice_tiny"}


def test_the_example_site_gives_this_command(repository_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = str(repository_root / "slurm" / "site.example.json")
    assert main(["ice_50b", "--site", site, "--set", "run.name=a", "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words == [
        "env",
        "ICE_CONTAINER_ARGS=apptainer\nexec\n--nv\n/images/ice.sif",
        "ICE_INTERFACE=ib0",
        "NCCL_IB_HCA=mlx5",
        "sbatch",
        "--account=my_project",
        "--partition=gpu",
        "--constraint=h100",
        "--time=24:00:00",
        "--cpus-per-task=12",
        "--exclude=node017",
        "--mail-type=FAIL",
        "slurm/ice_50b.sh",
        "--set",
        "run.name=a",
    ]


def test_the_example_names_every_setting(repository_root: Path) -> None:
    example = json.loads((repository_root / "slurm" / "site.example.json").read_text())
    assert set(example) == set(Site.model_fields)


def test_without_a_site_the_script_is_submitted_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ice_1b", "--dry-run"]) == 0
    assert capsys.readouterr().out == "sbatch slurm/ice_1b.sh\n"


def test_fewer_gpus_a_node_are_more_nodes() -> None:
    command = render("ice_3b", Site(gpus_per_node=4, gpu_type="a100"), Resources(2, 8), []).command
    assert command[1:4] == ["--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=a100:4"]
    with pytest.raises(BadInputError, match=r"gpus_per_node = 3: must divide the 16 ranks of slurm/ice_3b.sh"):
        render("ice_3b", Site(gpus_per_node=3), Resources(2, 8), [])


def test_values_reach_sbatch_as_they_are_and_its_status_comes_back(
    tmp_path: Path, repository_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text(FAKE_SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    nasty = "$(touch /tmp/x); 'a' \"b\" `c` *"
    site = write_site(
        tmp_path, container=["run", nasty], sbatch_arguments=[f"--comment={nasty}"], environment={"NCCL_IB_HCA": nasty}
    )
    assert main(["ice_1b", "--site", str(site), "--set", "run.name=b"]) == 3
    seen = (tmp_path / "seen").read_text().split("\0")[:-1]
    assert seen == [
        str(repository_root),
        f"run\n{nasty}",
        nasty,
        f"--comment={nasty}",
        "slurm/ice_1b.sh",
        "--set",
        "run.name=b",
    ]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of six cells, of which the third and the last are finished."""

    class Folder:
        def __init__(self, index: int) -> None:
            self.index = index

        def is_finished(self) -> bool:
            return self.index in (2, 5)

    path = tmp_path / "sweep.json"

    def load(source: Path, parallel: int | None) -> tuple[SweepSettings, list[Folder]]:
        assert source == path
        return load_settings(SweepSettings, path), [Folder(index) for index in range(6)]

    path.write_text(json.dumps({"name": "a", "config": "c.json", "sizes": {"a": {}}}))
    monkeypatch.setattr("launch.sweep.load_sweep", load)
    return path


def test_a_sweep_is_an_array_of_its_unfinished_cells(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--sweep", str(sweep), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"sbatch --array=0-1,3-4 slurm/scaling.sh {sweep}\n"
    assert run_sweep([str(sweep), "--executor", "slurm", "--parallel", "2", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"sbatch --array=0-1,3-4%2 slurm/scaling.sh {sweep}\n"


def test_a_sweeps_ranks_and_its_site_reach_sbatch(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.write_text(json.dumps({"name": "a", "config": "c.json", "sizes": {"a": {}}, "ranks": 8}))
    site = write_site(tmp_path, partition="gpu", gpus_per_node=4)
    assert main(["scaling", "--sweep", str(sweep), "--site", str(site), "--dry-run"]) == 0
    resources = "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4"
    assert capsys.readouterr().out == f"sbatch --array=0-1,3-4 --partition=gpu {resources} slurm/scaling.sh {sweep}\n"
    site = write_site(tmp_path, gpus_per_node=3)
    with pytest.raises(BadInputError, match="ranks = 8: must be a multiple of gpus_per_node = 3"):
        main(["scaling", "--sweep", str(sweep), "--site", str(site), "--dry-run"])


def test_a_sweep_belongs_to_the_scaling_script_alone(sweep: Path) -> None:
    for arguments in (["scaling"], ["ice_1b", "--sweep", "f"], ["scaling", "--sweep", str(sweep), "--set", "a.b=1"]):
        with pytest.raises(SystemExit) as refusal:
            main(arguments)
        assert refusal.value.code == 2


def test_the_scaling_script_is_as_thin_as_the_others(repository_root: Path) -> None:
    text = (repository_root / "slurm" / "scaling.sh").read_text()
    assert "Your site:" in text.splitlines()[2]
    assert text.endswith('source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh"\ntrain_cell "$@"\n')
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@300", "--output=%x-%A_%a.log"):
        assert f"#SBATCH {option}\n" in text
    assert read_resources(repository_root / "slurm" / "scaling.sh") == Resources(1, 1)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_are_the_numbers(numbers: set[int]) -> None:
    read = []
    for part in ranges(sorted(numbers)).split(","):
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


def test_what_is_printed_is_what_a_shell_would_run(tmp_path: Path) -> None:
    site = Site(container=("a b", "'"), environment={"X": "$(y)\\"})
    submission = render("ice_1b", site, Resources(1, 8), ["--set", "run.name=it's"])
    script = str(submission).replace("sbatch", 'bash -c \'printf "%s\\0" "$X" "$ICE_CONTAINER_ARGS" "$@"\' x', 1)
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split("\0")[:-1] == ["$(y)\\", "a b\n'", "slurm/ice_1b.sh", "--set", "run.name=it's"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"partiton": "gpu"}, "did you mean partition?"),
        ({"account": "a b"}, "account = "),
        ({"gpus_per_node": 0}, "gpus_per_node = 0"),
        ({"sbatch_arguments": ["other.sh"]}, "sbatch_arguments.0 = "),
        ({"container": ["a\nb"]}, "container.0 = "),
        ({"environment": {"A=B": "c"}}, "environment.A=B"),
    ],
)
def test_a_wrong_site_is_named(tmp_path: Path, values: dict[str, object], expected: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(expected)):
        main(["ice_1b", "--site", str(write_site(tmp_path, **values)), "--dry-run"])


def test_a_configuration_that_cannot_run_is_not_submitted() -> None:
    with pytest.raises(BadInputError, match="global_batch_size"):
        main(["ice_1b", "--set", "data.global_batch_size=7"])


def test_without_sbatch_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BadInputError, match="login node"):
        main(["ice_1b"])
