"""The repository agrees with itself: packages, pins, the README's tree, scripts, names."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGES = ("launch", "pretrain", "model", "data_pipeline")


@pytest.fixture(scope="module")
def project(repository_root: Path) -> dict[str, Any]:
    return tomllib.loads((repository_root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(repository_root: Path) -> dict[str, Version]:
    """Exact versions by canonical name; every line of the file must be one."""
    result = {}
    for line in (repository_root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, equals, version = line.partition("==")
        assert equals, f"constraints.txt: {line!r} is not name==version"
        result[canonicalize_name(name)] = Version(version)
    return result


def modules_on_disk(root: Path) -> list[Path]:
    """Source files of the packages, relative to ``root``."""
    return [path.relative_to(root) for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def readme_tree(root: Path) -> list[Path]:
    """The paths that the README's file tree names."""
    text = (root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree.*?```text\n(.*?)```", text, re.DOTALL)
    assert block is not None, "README.md has no tree"
    paths: list[Path] = []
    folders: list[str] = []
    for line in block.group(1).splitlines():
        depth, remainder = divmod(len(line) - len(line.lstrip()), 4)
        assert remainder == 0, f"indented by other than four spaces: {line!r}"
        name, _, description = line.strip().partition(" ")
        assert description.strip() or name == ".ci/" or name == "attention/", f"no description: {line!r}"
        folders = [*folders[:depth], name.rstrip("/")]
        paths.append(Path(*folders))
    return paths


def test_every_package_on_disk_is_listed_and_the_other_way_round(
    repository_root: Path, project: dict[str, Any]
) -> None:
    on_disk = {path.parent.as_posix().replace("/", ".") for path in modules_on_disk(repository_root)}
    scripts_beside_data = {"data_pipeline.corpus"}
    assert set(project["tool"]["setuptools"]["packages"]) == on_disk - scripts_beside_data


def test_torch_and_deepspeed_are_pinned_to_what_was_measured(pins: dict[str, Version]) -> None:
    assert pins["torch"] == Version("2.13.0")
    assert pins["deepspeed"] == Version("0.19.8")


def test_every_dependency_is_pinned_inside_its_range(project: dict[str, Any], pins: dict[str, Version]) -> None:
    tested_extras = ("dev", "cluster")  # megablocks is for an environment of its own, fp8 is in dev
    wanted = [*project["project"]["dependencies"]]
    for extra in tested_extras:
        wanted += project["project"]["optional-dependencies"][extra]
    for line in wanted:
        requirement = Requirement(line)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert version in requirement.specifier, f"constraints.txt has {requirement.name} {version}, not in {line}"


def test_dependencies_are_ranges_with_both_ends(project: dict[str, Any]) -> None:
    for line in project["project"]["dependencies"]:
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert ">=" in operators, line
        assert "==" not in operators, line


def test_extras_are_the_documented_ones(project: dict[str, Any]) -> None:
    assert set(project["project"]["optional-dependencies"]) == {"cluster", "fp8", "harness", "megablocks", "dev"}


def test_readme_tree_names_what_exists(repository_root: Path) -> None:
    assert [path.as_posix() for path in readme_tree(repository_root) if not (repository_root / path).exists()] == []


def test_readme_tree_names_every_module(repository_root: Path) -> None:
    named = set(readme_tree(repository_root))
    modules = [path for path in modules_on_disk(repository_root) if path.name != "__init__.py"]
    # A folder of the data pipeline is one line in the tree; its package's docstring says the rest.
    missing = [path for path in modules if path not in named and path.parent.parent != Path("data_pipeline")]
    assert [path.as_posix() for path in missing] == []


def test_links_between_documents_lead_somewhere(repository_root: Path) -> None:
    broken = []
    for document in [*repository_root.glob("*.md"), *(repository_root / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert broken == []


def test_licence_is_apache(repository_root: Path, project: dict[str, Any]) -> None:
    text = (repository_root / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project["project"]["license"] == "Apache-2.0"


def test_shell_scripts_parse_and_start_with_what_they_need(repository_root: Path) -> None:
    scripts = [repository_root / ".ci" / "run", *sorted((repository_root / "slurm").glob("*.sh"))]
    assert len(scripts) > 2
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        if script.name != "common.sh":
            assert script.stat().st_mode & 0o100, f"{script.name} cannot be executed"


def test_every_slurm_script_trains_a_configuration_that_exists(repository_root: Path) -> None:
    for script in sorted((repository_root / "slurm").glob("ice_*.sh")):
        text = script.read_text(encoding="utf-8")
        config = re.search(r"^train (\S+)", text, re.MULTILINE)
        assert config is not None, script.name
        assert (repository_root / config.group(1)).is_file(), script.name
        for option in ("--signal=B:USR1@", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in text, f"{script.name} lacks {option}"


def test_slurm_scripts_start_as_many_ranks_as_their_configuration_divides_into(repository_root: Path) -> None:
    for script in sorted((repository_root / "slurm").glob("ice_*.sh")):
        text = script.read_text(encoding="utf-8")
        nodes, tasks = (int(re.findall(rf"--{name}=(\d+)", text)[0]) for name in ("nodes", "ntasks-per-node"))
        config = json.loads((repository_root / "configs" / f"{script.stem}.json").read_text(encoding="utf-8"))
        ranks, parallel = nodes * tasks, config["parallel"]
        assert ranks % parallel["expert_parallel_size"] == 0, script.name
        assert config["data"]["global_batch_size"] % (parallel["micro_batch_size"] * ranks) == 0, script.name
        assert config["run"]["name"] == config["model"]["variant"] == script.stem


def test_no_module_hides_one_of_the_standard_library_or_of_a_dependency(repository_root: Path) -> None:
    """``python pretrain/main.py`` puts pretrain/ itself first on sys.path, so a name there hides others."""
    # ``evaluate`` comes with lm-evaluation-harness, whose metrics import it: the test below.
    installed = set(importlib.metadata.packages_distributions()) - {*PACKAGES, "evaluate"}
    modules = [path for path in modules_on_disk(repository_root) if path.name != "__init__.py"]
    taken = set(sys.stdlib_module_names) | installed
    assert [path.as_posix() for path in modules if path.stem in taken] == []


def test_the_evaluation_command_does_not_hide_the_package_of_its_name(repository_root: Path) -> None:
    folder = repository_root / "pretrain"
    program = (
        "import contextlib, runpy, sys\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "sys.argv = ['evaluate.py', '--help']\n"
        "with contextlib.suppress(SystemExit): runpy.run_path(sys.path[0] + '/evaluate.py', run_name='__main__')\n"
        f"print({str(folder)!r} in sys.path, {str(repository_root)!r} in sys.path)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.splitlines()[-1] == "False True"


def test_no_file_names_a_package_registry(repository_root: Path) -> None:
    hosts = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|registry\.npmjs|--(extra-)?index-url", re.IGNORECASE)
    names = ["pyproject.toml", "constraints.txt", "Makefile", "README.md", "CONTRIBUTING.md", ".ci/run"]
    assert [name for name in names if hosts.search((repository_root / name).read_text(encoding="utf-8"))] == []


def test_make_help_lists_every_target(repository_root: Path) -> None:
    shown = subprocess.run(["make", "help"], cwd=repository_root, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "data", "demo", "test", "lint", "format", "clean", "help"):
        assert f"make {target}" in shown
