"""A pytest plugin that writes what the fault tests of the Hub say of themselves as a table: `-p hub_table --hub-table FILE`.

Nothing is written where a test failed or was skipped: the table is of a run in which all held.
"""

from __future__ import annotations

import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_BEGIN, _END = "<!-- faults -->", "<!-- end of faults -->"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that has the table written."""
    parser.addoption("--hub-table", metavar="FILE", type=Path, help="write the table of faults into this Markdown file")


def pytest_configure(config: pytest.Config) -> None:
    """Collect in the process that sees all results."""
    if config.getoption("--hub-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config.getoption("--hub-table")))


class _Collector:
    def __init__(self, path: Path):
        self.path = path
        self.rows: list[list[Any]] = []
        self.not_passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.not_passed.append(f"{report.nodeid} ({report.outcome})")
        elif report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "hub_fault"]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.not_passed or not self.rows:
            terminalreporter.write_line(f"{self.path} was left as it is: " + ("; ".join(self.not_passed) or "nothing was run"))
            return
        _write(self.path, self.rows)
        terminalreporter.write_line(f"Wrote {len(self.rows)} rows into {self.path}")


def _write(path: Path, rows: list[list[Any]]) -> None:
    transport = "httpx2" if version("huggingface_hub").split(".")[0] != "1" else "httpx"
    versions = ", ".join(f"{name} {version(name)}" for name in ("huggingface_hub", transport))
    lines = [
        _BEGIN,
        f"`scripts/hub_faults` makes this table. Last made on {date.today().isoformat()}, on {platform.system()} with Python "
        f"{platform.python_version()}, {versions}: {len(rows)} rows, all of which held.", "",
        "| fault | the first try ends | the second try | first, s |", "| --- | --- | --- | ---: |",
        *(f"| {fault} | {outcome} | {second} | {seconds:.0f} |" for fault, outcome, second, seconds in rows),
        _END,
    ]
    old = path.read_text(encoding="utf-8")
    if _BEGIN not in old or _END not in old:
        sys.exit(f"{path} has no place for the table: put {_BEGIN} and {_END} where it belongs.")
    before, _, rest = old.partition(_BEGIN)
    path.write_text(before + "\n".join(lines) + rest.partition(_END)[2], encoding="utf-8")
