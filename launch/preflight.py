"""Before a long run: is there room, is the data whole, are the nodes alike, and is one of them slow?

``python launch/preflight.py --config FILE`` looks at this machine; the same line under ``deepspeed``, ``srun`` or
``mpirun`` looks at every node, together. A run does the cheap part by itself when it starts (``run.preflight``).

======================  =====================================================================  ======
check                   what is compared                                                       in a run
======================  =====================================================================  ======
disk space              free bytes with what the retention policy keeps, and one more          yes
data                    SHA-256 of files: some (``--hashes sampled``, on every rank) or all    sizes
versions                python, torch, deepspeed, git commit, settings: equal on all ranks     yes
clocks                  seconds between the hosts' clocks when they leave a barrier            yes
memory                  free host memory with a rank's part of a checkpoint; ``/dev/shm``      no
links                   seconds of an all-reduce and an all-to-all, by pairs of hosts          no
======================  =====================================================================  ======

A collective over all nodes takes as long as its slowest and names nobody. So hosts are timed in pairs, each with its
two neighbours in a ring: a host that is slow with both is slow itself (score: the shorter of its two times). It needs
three hosts to tell which.

Prints a table, writes ``RUN/preflight.json`` (``findings``, and ``bad_hosts`` for ``slurm/common.sh`` to exclude), and
exits with 0, with 78 when the settings or the data are wrong, or with 1 when a machine is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from launch.environment import Place, discover_place, name_accelerator, prepare_rendezvous
from launch.files import write_json_atomically
from launch.settings import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_FINISHED, BadInputError, exit_with_status, load_settings

if TYPE_CHECKING:
    from pretrain.config import TrainingConfig

FILE_NAME = "preflight.json"
SAMPLED_FILES = 8
CLOCK_SKEW_SECONDS = 5.0
SLOW_LINK_FACTOR = 2.0
LINK_BYTES = {"cpu": 4 * 2**20}
LINK_BYTES_ON_ACCELERATORS = 256 * 2**20
SHARED_MEMORY_BYTES = 66 * 2**20  # DeepSpeed's buffer in /dev/shm, each CPU rank
FREE_DEVICE_SHARE = 0.9
JOIN_SECONDS = 300

Gather = Callable[[Any], list[Any]]
Hashes = Literal["none", "sampled", "all"]


@dataclass(frozen=True)
class Finding:
    """What a check found. ``wrong``: nothing; the "input" (settings, data); or a "machine", the ``hosts`` named."""

    check: str
    detail: str
    wrong: Literal["input", "machine"] | None = None
    hosts: tuple[str, ...] = ()


def checkpoint_bytes(config: TrainingConfig) -> int:
    """What one checkpoint takes: fp32 master weights and two moments, whole weights, and the engine's own copy."""
    from model.parameters import count_parameters

    weight = 4 if config.precision.dtype == "fp32" else 2
    if config.precision.dtype == "auto":
        weight = 4  # the larger of the two that it may choose
    has_copy = config.parallel.zero_stage in (1, 2)
    per_parameter = 12 + weight * has_copy + weight * config.checkpoint.plain_weights
    return count_parameters(config.model, config.mean_loops).total * per_parameter


def kept_checkpoints(config: TrainingConfig) -> int:
    """The most that lie on disk at once: what the retention keeps at the end of the run, and the one being written."""
    section = config.checkpoint
    for_ever = 0 if section.keep_every is None else config.schedule.steps // section.keep_every
    return section.keep_last + for_ever + (section.keep_best or 0) + 1


def existing_parent(path: Path) -> Path:
    """The nearest folder of ``path`` that exists."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.is_dir())


def check_disk(config: TrainingConfig) -> Finding:
    """Free bytes where the run directory will be, and whether it can be written."""
    folder = existing_parent(config.run.path)
    if not os.access(folder, os.W_OK):
        return Finding("disk space", f"{folder}: cannot be written; choose another run.dir", "input")
    one, present = checkpoint_bytes(config), sum(1 for _ in config.run.path.glob("checkpoints/step_*/manifest.json"))
    needed, free = one * max(1, kept_checkpoints(config) - present), shutil.disk_usage(folder).free
    detail = f"{folder}: {_size(free)} free, {_size(needed)} needed for checkpoints of {_size(one)}"
    if free < needed:
        return Finding(
            "disk space", f"{detail}; free some, lower checkpoint.keep_last, or raise checkpoint.keep_every", "input"
        )
    return Finding("disk space", detail)


def check_data(config: TrainingConfig, hashes: Hashes, place: Place) -> Finding:
    """Sizes of all files of the data sets, and the SHA-256 of this rank's part of them, or of a sample of them."""
    from data_pipeline.dataset.reader import check_file, open_dataset

    hashed = 0
    try:
        for folder in config.data.folders:
            dataset = open_dataset(folder)
            entries = dataset.manifest.files()
            if hashes == "none":
                continue
            if hashes == "all":
                entries = entries[place.rank :: place.world_size]
            else:
                generator = random.Random(f"{time.time_ns()} {place.rank}")
                entries = generator.sample(entries, min(SAMPLED_FILES, len(entries)))
            for entry in entries:
                check_file(Path(folder), entry, True)
                hashed += 1
    except BadInputError as error:
        return Finding("data", str(error), "input")
    return Finding("data", f"whole, {hashed} files hashed on this rank" if hashed else "all files have their size")


def check_memory(config: TrainingConfig, place: Place, ranks_here: int) -> Finding:
    """Host memory for this host's part of a checkpoint's copy; ``/dev/shm`` for CPU ranks; the GPU's own."""
    import torch

    host = socket.gethostname()
    needed, free = checkpoint_bytes(config) * ranks_here // place.world_size, psutil.virtual_memory().available
    detail = f"{_size(free)} of host memory free, {_size(needed)} needed for a copy of the state"
    problems = [detail] if free < needed else []
    if not torch.cuda.is_available():
        shared, wanted = shutil.disk_usage("/dev/shm").free, SHARED_MEMORY_BYTES * ranks_here
        detail += f"; {_size(shared)} in /dev/shm"
        if shared < wanted:
            problems.append(f"{_size(shared)} free in /dev/shm, {_size(wanted)} needed")
    else:
        device_free, device_total = torch.cuda.mem_get_info()
        detail += f"; {_size(device_free)} of {_size(device_total)} of the GPU"
        if device_free < FREE_DEVICE_SHARE * device_total:
            problems.append(
                f"only {_size(device_free)} of {_size(device_total)} of the GPU are free: who else uses it?"
            )
    if problems:
        return Finding("memory", f"{host}: {'; '.join(problems)}", "machine", (host,))
    return Finding("memory", detail)


def software_versions(config: TrainingConfig) -> dict[str, str]:
    """What must be the same on every rank for them to compute the same."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "commit": commit.stdout.strip() or "no git checkout",
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
    }


def compare_versions(by_rank: Sequence[tuple[str, dict[str, str]]]) -> Finding:
    """``(host, versions)`` of every rank; the hosts of the minority are named."""
    counts: defaultdict[str, list[str]] = defaultdict(list)
    for host, versions in by_rank:
        counts[json.dumps(versions, sort_keys=True)].append(host)
    usual = max(counts, key=lambda key: len(counts[key]))
    common = json.loads(usual)
    if len(counts) == 1:
        return Finding("versions", ", ".join(f"{name} {value}" for name, value in common.items()))
    odd = sorted({host for key, hosts in counts.items() if key != usual for host in hosts})
    differences = sorted(
        f"{name} {versions[name]} on {host}, {common[name]} elsewhere"
        for host, versions in by_rank
        for name in common
        if versions[name] != common[name]
    )
    return Finding(
        "versions", f"{'; '.join(dict.fromkeys(differences))}; install the same everywhere", "input", tuple(odd)
    )


def compare_clocks(by_rank: Sequence[tuple[str, float]]) -> Finding:
    """``(host, time.time())`` of every rank as it left a barrier."""
    middle = median(seconds for _, seconds in by_rank)
    off = {host: seconds - middle for host, seconds in by_rank if abs(seconds - middle) > CLOCK_SKEW_SECONDS}
    if off:
        told = ", ".join(f"{host} by {seconds:+.1f} s" for host, seconds in sorted(off.items()))
        return Finding("clocks", f"off: {told}; synchronise them (chrony, NTP)", "machine", tuple(sorted(off)))
    spread = max(abs(seconds - middle) for _, seconds in by_rank)
    return Finding("clocks", f"within {spread:.2f} s of each other")


def slow_hosts(pair_seconds: dict[tuple[str, str], float], factor: float = SLOW_LINK_FACTOR) -> dict[str, float]:
    """Hosts that are slow with every neighbour, and how many times the median score theirs is.

    A host's score is its best time, so that a slow neighbour does not count against it.
    """
    times: defaultdict[str, list[float]] = defaultdict(list)
    for pair, seconds in pair_seconds.items():
        for host in pair:
            times[host].append(seconds)
    scores = {host: min(seconds) for host, seconds in times.items()}
    if len(scores) < 3:
        return {}
    usual = median(scores.values())
    return {host: score / usual for host, score in scores.items() if score > factor * usual}


def time_links(hosts: Sequence[str], place: Place, gather: Gather) -> Finding:
    """Time both collectives between the first ranks of neighbouring hosts (``hosts`` by rank); all ranks take part."""
    import torch
    import torch.distributed as dist

    leaders: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        leaders.setdefault(host, rank)
    names = list(leaders)
    if len(names) == 1:
        return Finding("links", "one host: nothing to compare")
    ring = [(names[index], names[(index + 1) % len(names)]) for index in range(len(names) if len(names) > 2 else 1)]
    # Every rank enters the making of every group, as torch demands.
    groups = {pair: dist.new_group([leaders[host] for host in pair]) for pair in ring}
    device = torch.device(_device_name())
    pair_seconds: dict[tuple[str, str], float] = {}
    for together in rounds_of(ring):
        mine = {
            pair: _time_pair(groups[pair], device)
            for pair in together
            if place.rank in (leaders[host] for host in pair)
        }
        for times in gather(mine):
            for pair, seconds in times.items():
                pair_seconds[pair] = max(seconds, pair_seconds.get(pair, 0.0))
    slow = slow_hosts(pair_seconds)
    usual = median(pair_seconds.values())
    if slow:
        told = ", ".join(f"{host} ({ratio:.1f} x the usual)" for host, ratio in sorted(slow.items()))
        return Finding("links", f"slow with both neighbours: {told}", "machine", tuple(sorted(slow)))
    return Finding("links", f"all-reduce and all-to-all between pairs of hosts: {usual * 1e3:.0f} ms")


def rounds_of(ring: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Pairs that share no host, to be timed at once: every second one, and the last of an odd ring by itself."""
    even = len(ring) - len(ring) % 2
    rounds = [ring[0:even:2], ring[1:even:2], ring[even:]]
    return [list(pairs) for pairs in rounds if pairs]


def _time_pair(group: Any, device: Any) -> float:
    """Seconds of an all-reduce and an all-to-all of two ranks, the best of three after one to warm up."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(LINK_BYTES.get(device.type, LINK_BYTES_ON_ACCELERATORS) // 4, device=device)
    received = torch.empty_like(tensor)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        dist.all_to_all_single(received, tensor, group=group)
        received[0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _device_name() -> str:
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def inspect(config: TrainingConfig, place: Place, gather: Gather, hashes: Hashes | None = None) -> list[Finding]:
    """The checks; collective. Without ``hashes`` only the cheap ones, which a run makes when it starts.

    Every rank gets all findings; of those that are well, one for each check.
    """
    host = socket.gethostname()
    hosts = gather(host)
    gather(None)  # the last thing before the clocks are read: the ranks leave it together
    clocks = gather((host, time.time()))
    mine = [check_disk(config)]
    if hashes is not None:
        mine += [check_data(config, hashes, place), check_memory(config, place, hosts.count(host))]
    found: dict[tuple[str, str], Finding] = {}
    for findings in gather(mine):
        for finding in findings:
            kind = finding.detail if finding.wrong else "well"
            found.setdefault((finding.check, kind), finding)
    wrong = {finding.check for finding in found.values() if finding.wrong}
    result = [finding for finding in found.values() if finding.wrong or finding.check not in wrong]
    result += [compare_versions(gather((host, software_versions(config)))), compare_clocks(clocks)]
    if hashes is not None:
        result.append(time_links(hosts, place, gather))
    return result


def exit_status(findings: Sequence[Finding]) -> int:
    """0; 78 when the input is wrong, which no other node mends; 1 when a machine is."""
    kinds = {finding.wrong for finding in findings}
    return EXIT_BAD_INPUT if "input" in kinds else EXIT_FAILED if "machine" in kinds else EXIT_FINISHED


def write_report(path: Path, findings: Sequence[Finding]) -> None:
    """The machine's copy. ``bad_hosts``: those with a machine's fault, to be left out when the job is queued again."""
    bad = sorted({host for finding in findings if finding.wrong == "machine" for host in finding.hosts})
    record = {
        "time": time.time(),
        "status": exit_status(findings),
        "findings": [asdict(finding) for finding in findings],
        "bad_hosts": bad,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, record)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Check machines, data and disk before a run.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's settings")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides")
    parser.add_argument("--hashes", choices=["none", "sampled", "all"], default="sampled", help="of the data's files")
    parser.add_argument("--json", action="store_true", help="print the report instead of a table")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    from pretrain.config import TrainingConfig, check_topology

    config = load_settings(TrainingConfig, options.config, options.overrides)
    place = discover_place()
    check_topology(config, place.world_size, str(options.config))
    name_accelerator()
    prepare_rendezvous(place)
    joined, gather = join(place)
    findings = [joined]
    if joined.wrong is None:
        findings += inspect(config, place, gather, options.hashes)
    status = exit_status(findings)
    if place.is_first:
        write_report(config.run.path / FILE_NAME, findings)
        if options.json:
            print((config.run.path / FILE_NAME).read_text(), end="")
        else:
            print_table(findings, place.world_size)
    return status


def join(place: Place) -> tuple[Finding, Gather]:
    """Meet the other ranks, on the accelerator's own backend; the finding says where, or why it failed."""
    import torch.distributed as dist

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        backend = get_accelerator().communication_backend_name()
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=JOIN_SECONDS))
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding("rendezvous", f"{where}: {reason}", "machine", (socket.gethostname(),)), lambda value: [value]

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * place.world_size
        dist.all_gather_object(values, value)
        return values

    return Finding("rendezvous", f"{place.world_size} ranks met at {where} ({backend})"), gather


def print_table(findings: Sequence[Finding], ranks: int) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"preflight, {ranks} rank{'s' if ranks > 1 else ''}", title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.check, "wrong" if finding.wrong else "well", finding.detail)
    console = Console(soft_wrap=False, highlight=False)
    console.print(table)
    for finding in findings:
        if finding.wrong:
            console.print(f"error: {finding.check}: {finding.detail}", soft_wrap=True, markup=False)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


if __name__ == "__main__":
    exit_with_status(main)
