"""What every test starts from: the same environment on every machine, and skips that cannot hide.

With ``ICE_REQUIRE_ALL_TESTS=1`` (``.ci/run`` sets it) a test marked ``multirank``, ``slurm``, ``mount``, ``demo``,
``kernels`` or ``harness`` that was skipped counts as failed, and so does a suite in which none of one of these ran.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Before torch or DeepSpeed is imported. One thread a process: sums in one order on every machine, and ranks that do
# not fight for two cores. Nothing may look for a network, a display or a tracker.
os.environ.update(
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    PYTHONHASHSEED="0",  # of the processes that tests start
)
# A suite run inside an allocation is not one of its ranks.
for _name in list(os.environ):
    if _name.startswith(("SLURM_", "OMPI_", "PMI_", "PMIX_")) or _name in {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "WANDB_API_KEY",
    }:
        del os.environ[_name]
# `deepspeed` and `ninja` are found although .venv was not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import hypothesis  # noqa: E402  (after the environment)
import pytest  # noqa: E402

# No limit of time: it would depend on what else the machine does.
hypothesis.settings.register_profile(
    "ice", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("ice")

REQUIRED_MARKERS = ("multirank", "slurm", "mount", "demo", "kernels", "harness")

_ran: Counter[str] = Counter()
_complaints: list[str] = []


def _is_strict() -> bool:
    return os.environ.get("ICE_REQUIRE_ALL_TESTS") == "1"


def _required_markers_of(item: pytest.Item) -> list[str]:
    return [name for name in REQUIRED_MARKERS if item.get_closest_marker(name)]


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count required tests that ran; where all are required, make the skip of one a failure."""
    report = yield
    markers = _required_markers_of(item)
    if markers and report.skipped and not hasattr(report, "wasxfail") and _is_strict():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"a {' and '.join(markers)} test must not be skipped here ({reason})"
    if report.when == "call" and not report.skipped:
        _ran.update(markers)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where all are required, a whole module with required tests must not skip itself either."""
    report = yield
    if report.outcome == "skipped" and _is_strict() and isinstance(collector, pytest.Module):
        source = collector.path.read_text(encoding="utf-8")
        if re.search(rf"\bmark\.({'|'.join(REQUIRED_MARKERS)})\b", source):
            report.outcome = "failed"
            report.longrepr = f"{collector.path.name} has required tests and must not be skipped here"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where all are required, their absence fails the run."""
    if not _is_strict() or session.config.option.collectonly:
        return
    _complaints.extend(f"no test marked {name} ran" for name in REQUIRED_MARKERS if not _ran[name])
    if _complaints and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was missing, above pytest's last line."""
    for complaint in _complaints:
        terminalreporter.write_line(f"ERROR: {complaint}, and ICE_REQUIRE_ALL_TESTS=1 needs it", red=True)
