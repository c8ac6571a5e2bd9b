"""A pytest plugin that counts what the fault tests say of themselves, and writes it as a table: `-p faults.table --fault-table`.

Nothing is written where a test failed: the table is of a run in which all held.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

_BEGIN, _END = "<!-- faults -->", "<!-- end of faults -->"
_TITLE = "# Training\n\n## Faults\n"
_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "safetensors")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that has the table written."""
    parser.addoption("--fault-table", metavar="FILE",
                     help="write the table of faults into this Markdown file, and as JSON beside this plugin")


def pytest_configure(config: pytest.Config) -> None:
    """Count in the process that sees all results."""
    if config.getoption("--fault-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Counter(Path(config.getoption("--fault-table"))))


class _Counter:
    def __init__(self, path: Path):
        self.path = path
        self.found: dict[tuple[str, int, str], Counter[str]] = {}
        self.not_passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed and not (report.when == "setup" and report.skipped and not report.user_properties):
            self.not_passed.append(f"{report.nodeid} ({report.outcome})")
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == "fault":
                fault, outcome, runs = value
                self.found.setdefault((report.location[0], report.location[1] or 0, fault), Counter())[outcome] += runs

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.not_passed or not self.found:
            terminalreporter.write_line(f"{self.path} was left as it is: " + ("; ".join(self.not_passed) or "nothing was run"))
            return
        _write(self.path, _merge(self.found))
        terminalreporter.write_line(f"Wrote the table of faults into {self.path}")


def _merge(found: dict[tuple[str, int, str], Counter[str]]) -> dict[str, Counter[str]]:
    """By fault, in the order of the tests."""
    merged: dict[str, Counter[str]] = {}
    for key in sorted(found, key=lambda key: (key[0] != "tests/test_faults.py", *key)):
        merged.setdefault(key[2], Counter()).update(found[key])
    return merged


def _write(path: Path, faults: dict[str, Counter[str]]) -> None:
    from importlib.metadata import version

    versions = {"Python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
    total = sum(sum(outcomes.values()) for outcomes in faults.values())
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [
        _BEGIN,
        f"`scripts/faults` makes this table. Last made on {date.today().isoformat()}, on {platform.system()} with {shown}: "
        f"{total:,} runs in which something went wrong, all of which ended as the last column says.", "",
        "| fault | runs | what the program did, and what the same command made of it |", "| --- | ---: | --- |",
        *(f"| {fault} | {runs:,} | {outcome} |" for fault, outcomes in faults.items() for outcome, runs in outcomes.items()),
        _END,
    ]
    old = path.read_text(encoding="utf-8") if path.exists() else f"{_TITLE}\n{_BEGIN}\n{_END}\n"
    if _BEGIN not in old or _END not in old:
        sys.exit(f"{path} has no place for the table: put {_BEGIN} and {_END} where it belongs.")
    before, _, rest = old.partition(_BEGIN)
    path.write_text(before + "\n".join(lines) + rest.partition(_END)[2], encoding="utf-8")
    document = {
        "date": date.today().isoformat(), "versions": versions,
        "faults": [{"fault": fault, "outcome": outcome, "runs": runs} for fault, outcomes in faults.items()
                   for outcome, runs in outcomes.items()],
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
