"""Text in a page of Markdown that a script writes: what lies between two marks, one of which names the script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Between `<!-- NAME: written by COMMAND -->` and `<!-- end of NAME -->`, each on a line of its own."""

    page: Path
    name: str
    command: str

    def text(self) -> str:
        """What is there now, without the line ends around it."""
        return self._parts()[1].strip("\n")

    def write(self, text: str) -> bool:
        """Put `text` there; says whether that changed anything."""
        before, old, after = self._parts()
        new = f"\n{text}\n"
        if new != old:
            self.page.write_text(f"{before}{new}{after}", encoding="utf-8")
        return new != old

    def _parts(self) -> tuple[str, str, str]:
        """The page up to the first mark and with it, what is between, and the rest.

        Raises:
            SystemExit: a mark is missing.
        """
        start, end = f"<!-- {self.name}: written by {self.command} -->", f"<!-- end of {self.name} -->"
        before, found_start, rest = self.page.read_text(encoding="utf-8").partition(start)
        between, found_end, after = rest.partition(end)
        if not (found_start and found_end):
            raise SystemExit(f"{self.page} lacks {start if not found_start else end}: put it where the text is to be.")
        return before + start, between, end + after
