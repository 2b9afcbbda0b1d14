"""Submit a training job for a site: ``python launch/submit.py ice_50b --site slurm/my_site.json [--dry-run]``.

``scaling --sweep configs/scaling/NAME.json`` submits the unfinished cells of a sweep as a job array, as
``launch/sweep.py --executor slurm`` does.

The scripts in ``slurm/`` say what a run needs anywhere; a site file (``slurm/site.example.json``) says what one cluster
calls it: account, partition, GPUs a node, container, network interface. This joins the two into one ``sbatch`` command:
options on the command line, which sbatch prefers to those in the script, and ``ICE_*`` variables in the environment,
which sbatch hands on. The configuration and its topology are checked first: a mistake should cost no time in the queue.

The number of ranks is the script's (nodes x tasks). A site with fewer GPUs a node gets more nodes.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from launch.settings import BadInputError, exit_with_status, load_settings

ROOT = Path(__file__).resolve().parent.parent
SCALING = "scaling"
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\x00-\x1f]+$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r\x00]*$")]
Option = Annotated[str, StringConstraints(pattern=r"^-[^\n\r\x00]+$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Site(BaseModel):
    """How a cluster wants jobs; what is left out stays as the script has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Word | None = Field(None, description="limit of one start, such as 24:00:00; the run goes on in the next")
    gpus_per_node: int | None = Field(None, ge=1)
    gpu_type: Word | None = Field(None, description="as in --gpus-per-node=TYPE:8")
    cpus_per_gpu: int | None = Field(None, ge=1)
    interface: Word | None = Field(None, description="network interface of NCCL's and gloo's sockets")
    python: Line | None = Field(None, description="the interpreter, in the container if there is one")
    container: tuple[Line, ...] = Field((), description="what runs a command in the container, one argument each")
    srun_arguments: tuple[Option, ...] = ()
    sbatch_arguments: tuple[Option, ...] = ()
    environment: dict[VariableName, Line] = Field(default_factory=dict)


class Resources(NamedTuple):
    """What a script asks for."""

    nodes: int
    tasks_per_node: int

    @property
    def ranks(self) -> int:
        """Training processes, one a GPU."""
        return self.nodes * self.tasks_per_node


class Submission(NamedTuple):
    """A command, and the variables that it needs besides those that are there."""

    command: list[str]
    variables: dict[str, str]

    def __str__(self) -> str:
        """What to type for it."""
        assignments = [f"{name}={value}" for name, value in sorted(self.variables.items())]
        return shlex.join([*(["env", *assignments] if assignments else []), *self.command])


def read_resources(script: Path) -> Resources:
    """Nodes and tasks from the ``#SBATCH`` lines of a training script."""
    text = script.read_text(encoding="utf-8")
    nodes, tasks = (
        int(value)
        for name in ("nodes", "ntasks-per-node")
        for value in re.findall(rf"^#SBATCH --{name}=(\d+)$", text, re.MULTILINE)
    )
    return Resources(nodes, tasks)


def render(
    name: str, site: Site, resources: Resources, training_arguments: list[str], array: str | None = None
) -> Submission:
    """The ``sbatch`` command of ``slurm/NAME.sh``; ``BadInputError`` when the site's nodes cannot hold its ranks."""
    options: list[str] = [] if array is None else [f"--array={array}"]
    for option in ("account", "partition", "qos", "constraint", "time"):
        value = getattr(site, option)
        if value is not None:
            options.append(f"--{option}={value}")
    gpus = site.gpus_per_node or resources.tasks_per_node
    if resources.ranks % gpus:
        raise BadInputError(f"gpus_per_node = {gpus}: must divide the {resources.ranks} ranks of slurm/{name}.sh")
    if gpus != resources.tasks_per_node:
        options += [f"--nodes={resources.ranks // gpus}", f"--ntasks-per-node={gpus}"]
    if gpus != resources.tasks_per_node or site.gpu_type is not None:
        options.append(f"--gpus-per-node={gpus if site.gpu_type is None else f'{site.gpu_type}:{gpus}'}")
    if site.cpus_per_gpu is not None:
        options.append(f"--cpus-per-task={site.cpus_per_gpu}")
    variables = {
        "ICE_INTERFACE": site.interface,
        "ICE_PYTHON": site.python,
        "ICE_CONTAINER_ARGS": "\n".join(site.container) or None,
        "ICE_SRUN_ARGS": "\n".join(site.srun_arguments) or None,
    }
    return Submission(
        ["sbatch", *options, *site.sbatch_arguments, f"slurm/{name}.sh", *training_arguments],
        {**site.environment, **{key: value for key, value in variables.items() if value is not None}},
    )


def submit_sweep(source: Path, site: Path | None, dry_run: bool, parallel: int | None = None) -> int:
    """Submit the cells of the sweep in ``source`` that are not finished; returns sbatch's exit status.

    Slurm runs as many at once as it can, or ``parallel``.
    """
    from launch.sweep import load_sweep

    sweep, folders = load_sweep(source, parallel)
    indices = [folder.index for folder in folders if not folder.is_finished()]
    if not indices:
        print(f"{sweep.path}: all {len(folders)} cells are finished")
        return 0
    chosen = _load_site(site)
    script = read_resources(ROOT / "slurm" / f"{SCALING}.sh")
    per_node = min(sweep.ranks, chosen.gpus_per_node or sweep.ranks)
    if sweep.ranks % per_node:
        raise BadInputError(f"{source}: ranks = {sweep.ranks}: must be a multiple of gpus_per_node = {per_node}")
    resources = Resources(sweep.ranks // per_node, per_node)
    if resources != script:
        size = [f"--nodes={resources.nodes}", f"--ntasks-per-node={per_node}"]
        if chosen.gpu_type is None:
            size.append(f"--gpus-per-node={per_node}")
        chosen = chosen.model_copy(update={"sbatch_arguments": (*size, *chosen.sbatch_arguments)})
    chosen = chosen.model_copy(update={"gpus_per_node": None})
    array = ranges(indices) + ("" if parallel is None else f"%{parallel}")
    whole = source.resolve()
    named = whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole  # sbatch is called in ROOT
    return _submit(render(SCALING, chosen, resources, [str(named)], array), dry_run)


def ranges(numbers: list[int]) -> str:
    """Rising numbers as Slurm writes them: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _load_site(path: Path | None) -> Site:
    return Site() if path is None else load_settings(Site, path)


def _submit(submission: Submission, dry_run: bool) -> int:
    """Print the command, or run it and return its status."""
    if dry_run:
        print(submission)
        return 0
    try:
        return subprocess.run(
            submission.command, cwd=ROOT, env={**os.environ, **submission.variables}, check=False
        ).returncode
    except FileNotFoundError:
        raise BadInputError("sbatch: no such command here; submit from a login node of the cluster") from None


def training_scripts() -> list[str]:
    """Names of scripts that train one configuration."""
    return sorted(path.stem for path in (ROOT / "slurm").glob("ice_*.sh"))


def main(arguments: list[str] | None = None) -> int:
    """Check, render, and submit or print."""
    parser = argparse.ArgumentParser(description="Submit a training job with a site's settings.")
    parser.add_argument("name", choices=[*training_scripts(), SCALING], help="slurm/NAME.sh and configs/NAME.json")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help=f"with {SCALING}: such as configs/scaling/NAME.json")
    parser.add_argument("--site", type=Path, metavar="FILE", help="such as slurm/site.example.json")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides", help="override one setting"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, submit nothing")
    options = parser.parse_args(arguments)
    if (options.name == SCALING) != (options.sweep is not None):
        parser.error(f"--sweep FILE belongs to {SCALING}, and {SCALING} needs it")
    if options.name == SCALING:
        if options.overrides:
            parser.error(f"{SCALING}: --set is not for a sweep; its file has the settings")
        return submit_sweep(options.sweep, options.site, options.dry_run)

    from pretrain.config import TrainingConfig, check_topology  # imports torch, which the parser should not wait for

    site = _load_site(options.site)
    config_path = ROOT / "configs" / f"{options.name}.json"
    config = load_settings(TrainingConfig, config_path, options.overrides)
    resources = read_resources(ROOT / "slurm" / f"{options.name}.sh")
    check_topology(config, resources.ranks, str(config_path))
    overrides = [part for override in options.overrides for part in ("--set", override)]
    return _submit(render(options.name, site, resources, overrides), options.dry_run)


if __name__ == "__main__":
    exit_with_status(main)
