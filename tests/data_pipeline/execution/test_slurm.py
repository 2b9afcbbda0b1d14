"""The Slurm executor against stand-ins for sbatch, squeue and scancel that run arrays on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import SlurmSettings
from data_pipeline.execution.pieces import WorkersLostError
from data_pipeline.execution.progress import Reporter
from data_pipeline.execution.slurm import SlurmExecutor, own_addresses
from data_pipeline.execution.stages import Stage, StageRunner
from launch.settings import BadInputError

StepFor = Callable[..., PipelineStep]
ContentsOf = Callable[[Path], dict[str, str]]
WholeOutput = Callable[[int], dict[str, str]]

# One program for the three commands. A job is a file: its id is the name, a line each for the tasks' process ids.
STAND_IN = """
import os, re, subprocess, sys
from pathlib import Path

name, state = Path(sys.argv[0]).name, Path(os.environ["STAND_IN_STATE"])
with (state / "calls").open("a") as calls:
    print(name, *sys.argv[1:], file=calls)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if name == "sbatch":
    if (state / "refuse").exists():
        sys.exit("sbatch: error: invalid partition specified: gpu")
    leaked = [key for key in os.environ if key.startswith("SLURM_") and key != "SLURM_CONF"]
    assert not leaked, leaked
    options = dict(option.removeprefix("--").partition("=")[::2] for option in sys.argv[1:])
    script = sys.stdin.read()
    job = str(100 + len(list(state.glob("job-*"))))
    pids = []
    for task in range(int(options["array"].split("-")[1]) + 1):
        log = open(options["output"].replace("%A", job).replace("%a", str(task)), "w")
        process = subprocess.Popen(
            ["/bin/sh", "-c", script], cwd=options["chdir"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)},
        )
        pids.append(str(process.pid))
    (state / f"job-{job}").write_text("\\n".join(pids))
    print(job + ";cluster")
elif name == "squeue":
    (option,) = (option for option in sys.argv if option.startswith("--jobs="))
    path = state / ("job-" + option.split("=")[1])
    running = [pid for pid in path.read_text().split() if is_running(pid)]
    if not running:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print(*running)
else:
    for job in sys.argv[1:]:
        for pid in (state / f"job-{job}").read_text().split():
            if is_running(pid):
                os.kill(int(pid), 15)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> Iterator[Path]:
    """The stand-ins' state folder; whatever tasks are left at the end of a test are a mistake."""
    state, commands = tmp_path / "state", tmp_path / "commands"
    state.mkdir()
    commands.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (commands / name).write_text(f"#!{sys.executable}\n{STAND_IN}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_STATE", str(state))
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the driver is itself a job
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    monkeypatch.chdir(repository_root)
    yield state
    deadline = time.monotonic() + 20
    while any(map(_is_running, _tasks(state))):
        assert time.monotonic() < deadline, "tasks are left"
        time.sleep(0.05)


def _tasks(state: Path) -> list[int]:
    return [int(pid) for path in sorted(state.glob("job-*")) for pid in path.read_text().split()]


def _is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def executor(**settings: object) -> SlurmExecutor:
    """With asking Slurm often, as tests are short."""
    return SlurmExecutor(SlurmSettings.model_validate({"poll_seconds": 0.2, "tasks": 2, **settings}))


def calls(state: Path, name: str) -> list[str]:
    return [line for line in (state / "calls").read_text().split("\n") if line.startswith(name)]


def test_all_pieces_are_done_by_arrays_of_the_size_that_the_site_allows(
    cluster: Path, tmp_path: Path, step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    folder = tmp_path / "stage-0.a.partial"
    folder.mkdir()
    site = {"partition": "cpu", "account": "us", "arguments": ["--qos=low"], "mem_per_cpu_gb": 3, "time": "1-00:00:00"}
    executor(tasks=3, max_array_size=2, **site).run([step_for(folder)], 7, folder / "logs")
    assert contents_of(folder) == whole_output(7)
    first, second = calls(cluster, "sbatch")
    assert "--array=0-1" in first
    assert "--array=0-0" in second
    for option in ("partition=cpu", "account=us", "qos=low", "mem-per-cpu=3G", "time=1-00:00:00", "job-name=ice-stage"):
        assert f"--{option}" in first
    assert calls(cluster, "scancel") == ["scancel 100 101"]
    secret = folder / "logs" / "workers.json"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_tasks_that_die_are_made_up_for_in_another_attempt(
    cluster: Path, tmp_path: Path, step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    once = tmp_path / "once"
    once.mkdir()
    for piece in set(range(6)) - {1, 4}:
        (once / str(piece)).touch()

    def build(folder: Path) -> None:
        executor().run([step_for(folder, killed=[1, 4], once=once)], 6, folder / "logs")

    finished = StageRunner(tmp_path / "stages", Reporter()).run(Stage("stage", None, {}, build))
    assert contents_of(finished.folder) == whole_output(6)
    assert len(calls(cluster, "sbatch")) == 2
    assert [path.name for path in (tmp_path / "stages").iterdir()] == [finished.folder.name]


def test_a_piece_that_kills_every_task_is_given_up_with_its_name(
    cluster: Path, tmp_path: Path, step_for: StepFor
) -> None:
    def build(folder: Path) -> None:
        executor().run([step_for(folder, killed=[1])], 2, folder / "logs")

    with pytest.raises(WorkersLostError, match=r"^stage, piece 1 of 2: the Slurm task ended \(job 10\d; "):
        StageRunner(tmp_path / "stages", Reporter()).run(Stage("stage", None, {}, build))
    assert len(calls(cluster, "sbatch")) == 4  # the first attempt finished the other piece


def test_bad_input_in_a_task_is_the_drivers_error(cluster: Path, tmp_path: Path, step_for: StepFor) -> None:
    folder = tmp_path / "stage-0.a.partial"
    folder.mkdir()
    with pytest.raises(BadInputError, match=r"^input 2: is bad"):
        executor().run([step_for(folder, bad=[2, 3])], 5, folder / "logs")


def test_what_sbatch_refuses_names_the_section(cluster: Path, tmp_path: Path, step_for: StepFor) -> None:
    (cluster / "refuse").touch()
    with pytest.raises(BadInputError, match=r"execution\.slurm: sbatch refused \(sbatch: error: invalid partition"):
        executor().run([step_for(tmp_path)], 5, tmp_path / "logs")


def test_without_slurm_the_command_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_for: StepFor
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInputError, match="sbatch is not on PATH"):
        executor().run([step_for(tmp_path)], 5, tmp_path / "logs")


def test_tasks_without_a_way_to_the_driver_say_which_setting_helps(
    cluster: Path, tmp_path: Path, step_for: StepFor
) -> None:
    folder = tmp_path / "stage-0.a.partial"
    folder.mkdir()
    with pytest.raises(WorkersLostError, match=r"works on this machine") as caught:
        executor(driver_host="no-such-host.invalid").run([step_for(folder)], 2, folder / "logs")
    assert "execution.slurm.driver_host" in str(caught.value)
    assert caught.value.finished == 0


def test_a_stranger_without_the_key_gets_no_work_and_stops_nobody(
    cluster: Path, tmp_path: Path, step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    folder = tmp_path / "stage-0.a.partial"
    folder.mkdir()
    heard: list[bytes] = []

    def intrude() -> None:
        address = folder / "logs" / "workers.json"
        while not address.exists() or not address.read_text():
            time.sleep(0.001)
        with socket.create_connection(("127.0.0.1", json.loads(address.read_text())["port"])) as stranger:
            stranger.sendall(b"\x00\x00\x00\x14" + bytes(20))
            while part := stranger.recv(4096):
                heard.append(part)

    thread = threading.Thread(target=intrude)
    thread.start()
    executor().run([step_for(folder)], 3, folder / "logs")
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(b"".join(heard)) < 100, "a challenge and a refusal, not the pipeline"
    assert contents_of(folder) == whole_output(3)


def test_a_terminated_driver_cancels_its_arrays(cluster: Path, tmp_path: Path, step_for: StepFor) -> None:
    folder = tmp_path / "stage-0.a.partial"
    folder.mkdir()

    driver = os.getpid()

    def terminate(data: object, rank: int = 0, world_size: int = 1) -> None:
        os.kill(driver, signal.SIGTERM)
        time.sleep(30)

    with pytest.raises(SystemExit) as caught:
        executor().run([terminate], 2, folder / "logs")  # type: ignore[list-item]
    assert caught.value.code == 128 + signal.SIGTERM
    assert calls(cluster, "scancel") == ["scancel 100"]


def test_this_machine_has_a_name_and_addresses() -> None:
    name, *addresses = own_addresses()
    assert name
    assert all(address.count(".") == 3 for address in addresses)
