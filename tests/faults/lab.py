"""Small runs that have everything in them, what each must come to, and what is asked of the program after a fault."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from faults.runner import Done, Fault, Process, Zygote

# 24 rows to train on: two epochs of six steps of 2 x 2 rows, each evaluation between two checkpoints as well as at one.
NUM_STEPS, SAVE_EVERY = 12, 2
_RECIPE = {
    "model": {"dtype": "fp32"},
    "data": {"validation": 0.25},
    "lora": {"r": 8, "dropout": 0.1},
    "train": {"epochs": 2, "batch": 4, "micro_batch": 2, "learning_rate": 5e-3, "eval_every": 3, "save_every": SAVE_EVERY,
              "keep": "last", "sample_rows": 2},
    "memory": {"device": "cpu"},
}
# Of a line of metrics.jsonl, all that is not a measurement of time or memory.
_EXACT = ("step", "epoch", "loss", "grad_norm", "learning_rate", "token_accuracy", "tokens", "trained_tokens",
          "eval_loss", "eval_perplexity", "eval_tokens", "effective_learning_rate", "perplexity", "monitor", "advice")


@dataclass(frozen=True)
class Outcome:
    """What a run came to: all that must be the same when it is interrupted on the way.

    Attributes:
        adapter: sha256 of adapter_model.safetensors.
        rows: of metrics.jsonl.
        judged: what was found before and after training.
    """

    adapter: str
    rows: tuple[Mapping[str, Any], ...]
    judged: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Of a run that is finished."""
        adapter = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        rows = ({key: row[key] for key in _EXACT if key in row} for row in read_rows(folder))
        return cls(adapter, tuple(rows), {when: report[when] for when in ("before", "after")})

    def differences(self, other: Outcome) -> list[str]:
        """One line for each thing that is not the same; empty where all is."""
        found = []
        mine, theirs = ([row["step"] for row in rows] for rows in (self.rows, other.rows))
        if self.adapter != other.adapter:
            found.append("the adapter's bytes")
        if mine != theirs:
            found.append(f"the steps of metrics.jsonl: {mine}, not {theirs}")
        else:
            found += [f"metrics.jsonl: {mine}, not {theirs}" for mine, theirs in zip(self.rows, other.rows) if mine != theirs]
        if self.judged != other.judged:
            found.append(f"the evaluations before and after: {self.judged}, not {other.judged}")
        return found


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl; a line that is still being written is left out."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def sealed(folder: Path) -> list[int]:
    """Steps of the checkpoints that are in place, ascending."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in (folder / "checkpoints").glob("*"))
    return sorted(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class Plain:
    """A run that nothing happened to.

    Attributes:
        largest_file: bytes of the largest file of its checkpoints.
        operations: what it did to its files, in order: "kind path", of a rename "rename path path".
    """

    folder: Path
    seconds: float
    largest_file: int
    operations: list[str]

    def count(self, pattern: str) -> int:
        """How many of its operations `faults.injections.at_operation` would count."""
        found = sum(bool(re.search(pattern, line.partition(" ")[2])) for line in self.operations)
        assert found, f"no file of a run matches {pattern}"
        return found


@dataclass
class Lab:
    """Where runs are made. `home` is a folder of the tests' own."""

    zygote: Zygote
    home: Path
    model: Path
    _references: dict[tuple[str, ...], Outcome] = field(default_factory=dict)
    _num_folders: int = 0

    def __post_init__(self) -> None:
        self.data = write_rows(self.home / "rows.jsonl")
        self.recipe = self.write_recipe(self.home / "small.yaml", self.data)

    @cached_property
    def plain(self) -> Plain:
        """The plain run, looked at while it happens. Its plan has been made before, so that its time is that of all others."""
        self.reference()
        folder, into = self.folder(), self.home / "operations"
        done = self.run(folder, faults=[("list_operations", {"into": str(into), "below": str(folder)})])
        assert done.code == 0, done.told
        assert not Outcome.of(folder).differences(self.reference()), "two runs of the same are not the same"
        largest = max(path.stat().st_size for path in (folder / "checkpoints").glob("checkpoint-*/*"))
        return Plain(folder, done.seconds, largest, into.read_text(encoding="utf-8").splitlines())

    def write_recipe(self, path: Path, data: Path) -> Path:
        """The recipe of all these runs, at another place or over other rows."""
        places = {"model": {"base": str(self.model)}, "data": {"path": str(data)}}
        sections = {name: {**places.get(name, {}), **values} for name, values in _RECIPE.items()}
        path.write_text(json.dumps(sections, ensure_ascii=False), encoding="utf-8")  # YAML reads JSON
        return path

    def folder(self) -> Path:
        """A place for a run; nothing is there yet."""
        self._num_folders += 1
        return self.home / f"run-{self._num_folders}"

    def start(self, folder: Path, *words: str, faults: Sequence[Fault] = (), **values: Any) -> Process:
        """Begin the run, or go on with it. It is the same command for both."""
        argv = ["train", self.recipe, f"output.dir={folder}", *words]
        return self.zygote.start(argv, faults=[("draw_nothing", {}), *faults], **values)

    def run(self, folder: Path, *words: str, faults: Sequence[Fault] = (), timeout: float = 120) -> Done:
        """`start`, to the end."""
        return self.start(folder, *words, faults=faults).wait(timeout)

    def reference(self, *words: str) -> Outcome:
        """What the run comes to when nothing happens."""
        if words not in self._references:
            folder = self.folder()
            done = self.run(folder, *words)
            assert done.code == 0, done.err
            self._references[words] = Outcome.of(folder)
        return self._references[words]

    def finish(self, folder: Path, *words: str, said: Sequence[str] = (), like: Outcome | None = None) -> Done:
        """The same command, and nothing goes wrong now: it must end well and come to the same, to the last bit.

        Args:
            said: words that it must say.
            like: what it must come to; None for the reference of the same words.
        """
        expected = self.reference(*words) if like is None else like
        done = self.run(folder, *words)
        assert done.code == 0, done.told
        missing = [each for each in said if each not in done.shown]
        assert not missing, f"not said: {missing}\n{done.told}"
        differences = Outcome.of(folder).differences(expected)
        assert not differences, "\n".join(differences)
        left = [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
        assert not left, f"left over: {left}"
        return done


def refused(done: Done, code: int, *said: str) -> None:
    """It stopped with that exit code and one block that says these words, not like a program that fell over."""
    assert done.code == code, done.told
    assert "Traceback" not in done.err, done.told
    blocks = re.split(r"^error: ", done.err, flags=re.MULTILINE)
    assert len(blocks) == 2, done.told
    shown = " ".join(blocks[1].split())
    missing = [each for each in said if each not in shown]
    assert not missing, f"not said: {missing}\n{done.told}"


def write_rows(path: Path, num_rows: int = 32) -> Path:
    """Conversations of different lengths."""
    words = "the cat sat on the mat and the dog ran to the red house".split()
    lines = []
    for i in range(num_rows):
        answer = " ".join(words[(i * 3 + j) % len(words)] for j in range(1 + i % 7))
        lines.append({"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
