"""sweep.json, sweep.md and plots/, written after every point, so that a look into the folder shows how far it is."""

from __future__ import annotations

import json
from pathlib import Path

from qlora.durable import write_text
from qlora.errors import OutputError
from qlora.redact import redact, redact_values
from qlora.results.report import escape
from qlora.sweeping import table
from qlora.sweeping.plots import draw
from qlora.sweeping.results import SweepResult


def write(result: SweepResult, folder: Path) -> None:
    """Everything that a sweep leaves beside its study and its runs.

    Raises:
        OutputError: the folder cannot be written.
    """
    document = redact_values(result.to_json())
    try:
        plots = draw(result, folder / "plots") if result.choice is not None else []
        write_text(folder / "sweep.json", json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
        write_text(folder / "sweep.md", redact(render(result, [path.name for path in plots])))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.",
                          "Make room there; the same command then goes on.") from error


def render(result: SweepResult, plots: list[str]) -> str:
    """sweep.md."""
    columns = table.head(result)
    lines = [f"# Sweep: {escape(result.name)}", ""]
    if result.choice is None:
        lines += ["**Not finished.** The same command goes on.", ""]
    for number, line in enumerate(table.winner_lines(result)):
        lines += [f"**{escape(line)}**" if number == 0 else f"- {escape(line)}"] + ([""] if number == 0 else [])
    if result.command:
        lines += ["", "```sh", result.command, "```"]
    lines += ["", f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += [f"| {' | '.join(escape(cell) for cell in row)} |" for row in table.rows(result)]
    lines += ["", table.before_line(result), "", *table.about(result), ""]
    lines += [f"![{name.removesuffix('.png')}](plots/{name})" for name in plots]
    versions = ", ".join(f"{name} {version}" for name, version in result.facts["versions"].items())
    lines += ["", f"{escape(str(result.facts['model']['base']))} on {escape(str(result.facts['device']))}; {versions}."]
    return "\n".join(lines) + "\n"
