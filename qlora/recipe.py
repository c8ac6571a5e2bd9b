"""Read a recipe: a sparse YAML file in seven sections, checked strictly and overridable on the command line.

What can be set is declared in `qlora.settings`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, field_validator

from qlora.errors import RecipeError
from qlora.settings import (
    SECTIONS, SHORTHANDS, DataSection, HubSection, LoraSection, MemorySection, ModelSection, OutputSection, TrainSection,
)

_FILE_ENDINGS = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".jinja", ".j2"}
_COMMAND_LINE = -1  # stands for a line number where a value was not read from the file
# What the settings are called elsewhere, for "did you mean".
_OTHER_NAMES = {
    "rank": "lora.r", "lora_r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets", "lr": "train.learning_rate", "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule", "num_train_epochs": "train.epochs", "num_epochs": "train.epochs",
    "batch_size": "train.batch", "micro_batch_size": "train.micro_batch", "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulation", "grad_accum": "train.accumulation", "warmup_ratio": "train.warmup",
    "gradient_checkpointing": "memory.checkpointing", "optim": "train.optimizer", "eval_steps": "train.eval_every",
    "save_steps": "train.save_every", "max_seq_length": "data.max_length", "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length", "seq_len": "data.max_length", "cutoff_len": "data.max_length",
    "val_size": "data.validation", "val_set_size": "data.validation", "sample_packing": "data.packing",
    "dataset": "data.path", "vram": "memory.budget", "output_dir": "output.dir", "name": "model.base",
    "base_model": "model.base", "hub_model_id": "hub.repo",
}


class Recipe(BaseModel):
    """A whole recipe. Build one in Python with `Recipe(model=..., data=...)`, or from YAML with `load_recipe`.

    A section that is a single text is its first setting: `model: builtin:tiny` means `model: {base: builtin:tiny}`.

    Raises:
        pydantic.ValidationError: in Python, for values that do not fit; `load_recipe` turns these into RecipeError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    output: OutputSection = OutputSection()
    hub: HubSection | None = None

    _name: str = PrivateAttr("run")
    _source: str | None = PrivateAttr(None)
    _overrides: tuple[str, ...] = PrivateAttr(())

    @field_validator("model", "data", "output", "hub", mode="before")
    @classmethod
    def _text_is_first_setting(cls, value: Any, info: Any) -> Any:
        return {SHORTHANDS[info.field_name]: value} if isinstance(value, str) else value

    @property
    def name(self) -> str:
        """Stem of the file the recipe came from; names the run folder."""
        return self._name

    @property
    def source(self) -> str | None:
        """The file the recipe came from, as it was written; None for one built in Python."""
        return self._source

    @property
    def overrides(self) -> tuple[str, ...]:
        """The values that were replaced on the command line, as they were written."""
        return self._overrides

    def is_given(self, key: str) -> bool:
        """Whether a person wrote `section.setting`, as against a default."""
        section, _, setting = key.partition(".")
        if section not in self.model_fields_set:
            return False
        return setting in getattr(self, section).model_fields_set

    def replace(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with dotted settings replaced, checked like any recipe. What was given stays marked as given."""
        sections = {name: getattr(self, name).model_dump(exclude_unset=True) for name in self.model_fields_set
                    if getattr(self, name) is not None}
        for key, value in values.items():
            section, _, setting = key.partition(".")
            sections.setdefault(section, {})[setting] = value
        copy = _validated(sections, "recipe", {})
        copy._name, copy._source, copy._overrides = self._name, self._source, self._overrides
        return copy

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """A copy with `section.setting=value` replaced, as on the command line; they join those that were written there.

        Raises:
            RecipeError: with every problem found.
        """
        overrides = tuple(overrides)
        tree = {name: getattr(self, name).model_dump(exclude_unset=True) for name in self.model_fields_set
                if getattr(self, name) is not None}
        lines: dict[str, int] = {}
        _apply_overrides(tree, overrides, lines)
        copy = _validated(tree, self._source or "recipe", lines)
        copy._name, copy._source, copy._overrides = self._name, self._source, (*self._overrides, *overrides)
        return copy


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `section.setting=value` overrides.

    File paths in the recipe are relative to the recipe's folder, those in overrides to the current folder.

    Raises:
        RecipeError: with every problem found, each with its place in the file.
    """
    path, overrides = Path(path), tuple(overrides)
    tree, lines = _read_yaml(path)
    for section, short in SHORTHANDS.items():
        if isinstance(tree.get(section), str):
            tree[section] = {short: tree[section]}
            lines[f"{section}.{short}"] = lines.get(section, 0)
    _anchor_paths(tree, path.parent)
    _apply_overrides(tree, overrides, lines)
    recipe = _validated(tree, str(path), lines)
    recipe._name = path.stem
    recipe._source = str(path)
    recipe._overrides = overrides
    return recipe


def build_recipe(name: str = "run", overrides: Iterable[str] = (), **sections: Any) -> Recipe:
    """A recipe from Python values, with the same checks and messages as a file, and the same overrides.

    Raises:
        RecipeError: with every problem found.
    """
    tree = {key: {SHORTHANDS[key]: value} if isinstance(value, str) and key in SHORTHANDS else value
            for key, value in sections.items()}
    lines, overrides = {}, tuple(overrides)
    _apply_overrides(tree, overrides, lines)
    recipe = _validated(tree, "recipe", lines)
    recipe._name, recipe._overrides = name, overrides
    return recipe


# --- reading -----------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file as plain values, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
        hint = f"Did you mean {path.parent / close[0]}?" if close else "Check the path; recipes/ holds ready ones."
        raise RecipeError(f"There is no recipe at {path}.", hint) from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder, not a recipe.", "Name one .yaml file in it.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.", "Save it as UTF-8 text.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
        json.dumps(tree, default=str, skipkeys=True)
    except (RecursionError, ValueError) as error:  # an alias that holds itself, or brackets without end
        raise RecipeError(f"{path} is nested without end.", "Write sections with their settings, two levels deep.") from error
    except yaml.MarkedYAMLError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise RecipeError(f"{place}: not valid YAML: {error.problem}.", "Indent with spaces and write key: value.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}.", "Indent with spaces and write key: value.") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise RecipeError(f"{path} is {found}; a recipe is a mapping of sections.", f"Sections: {', '.join(SECTIONS)}.")
    lines: dict[str, int] = {}
    repeated = [f"{path}:{line}: {key} is written twice." for key, line in _walk_keys(node, "", lines)]
    if repeated:
        raise RecipeError("\n".join(repeated), "Keep one of them.")
    return {str(key): value for key, value in tree.items()}, lines


def _walk_keys(node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Fill `lines` with the 1-based line of every dotted key; yield those that come twice."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            yield key, line
        lines[key] = line
        yield from _walk_keys(value_node, f"{key}.", lines)


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make file names relative to the recipe's folder absolute, where such a file is there."""
    for section, cls in SECTIONS.items():
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        for name, field in cls.model_fields.items():
            value = values.get(name)
            if field.json_schema_extra["path"] and isinstance(value, str):
                candidate = folder / Path(value).expanduser()
                looks_like_file = value.startswith((".", "~")) or Path(value).suffix.lower() in _FILE_ENDINGS
                if candidate.exists() or (looks_like_file and not Path(value).is_absolute()):
                    values[name] = str(candidate.resolve())


def _apply_overrides(tree: dict[str, Any], overrides: Iterable[str], lines: dict[str, int]) -> None:
    problems = [problem for override in overrides if (problem := _apply_override(tree, override, lines))]
    if problems:
        raise RecipeError("\n".join(problems), "Overrides are written section.setting=value, for example lora.r=32.")


def _apply_override(tree: dict[str, Any], override: str, lines: dict[str, int]) -> str | None:
    """Set one dotted key, and forget its line in the file; return what is wrong with the override, if anything."""
    key, equals, text = override.partition("=")
    section, dot, setting = key.strip().partition(".")
    if equals and not dot and section in SHORTHANDS:
        setting, dot = SHORTHANDS[section], "."
    if not equals or not dot or not setting:
        return f"{override!r} is not an override."
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not isinstance(tree.get(section), dict):
        tree[section] = {}
    tree[section][setting.strip()] = value
    lines[f"{section}.{setting.strip()}"] = _COMMAND_LINE
    return None


# --- checking ----------------------------------------------------------------------------------------------------------


def _validated(tree: Mapping[str, Any], source: str, lines: Mapping[str, int]) -> Recipe:
    try:
        recipe = Recipe.model_validate(dict(tree))
    except ValidationError as error:
        found: dict[str, str] = {}
        for item in error.errors():
            key, problem = _explain(item)
            found.setdefault(key, problem)
        raise RecipeError("\n".join(_place(source, lines, key) + text for key, text in found.items())) from None
    train = recipe.train
    parts = (train.batch, train.micro_batch, train.accumulation)
    if "auto" not in parts and train.batch != train.micro_batch * train.accumulation:
        raise RecipeError(
            f"{_place(source, lines, 'train.batch')}train.batch is {train.batch}, but train.micro_batch x train.accumulation "
            f"is {train.micro_batch} x {train.accumulation} = {train.micro_batch * train.accumulation}.",
            "Leave one of the three out; it follows from the other two.",
        )
    return recipe


def _place(source: str, lines: Mapping[str, int], key: str) -> str:
    while key and key not in lines:
        key = key.rpartition(".")[0]
    if lines.get(key) == _COMMAND_LINE:
        return "command line: "
    return f"{source}:{lines[key]}: " if key in lines else f"{source}: "


def _explain(item: Any) -> tuple[str, str]:
    """Dotted key and message for one of pydantic's findings, in the words of the declarations."""
    location = [str(part) for part in item["loc"]]
    section = location[0]
    if section not in SECTIONS:
        return section, f"unknown section {section!r}.{_nearest(section, SECTIONS)} Sections: {', '.join(SECTIONS)}."
    if len(location) == 1:
        if item["type"] == "missing":
            short = SHORTHANDS[section]
            return section, f"{section}.{short} is missing: {SECTIONS[section].model_fields[short].json_schema_extra['expects']}."
        return section, f"{section} is {item['input']!r}; it must be a mapping of its settings."
    key = f"{section}.{location[1]}"
    fields = SECTIONS[section].model_fields
    if location[1] not in fields:
        return key, f"unknown setting {key}.{_nearest(location[1], fields, section)}"
    expects = fields[location[1]].json_schema_extra["expects"]
    if item["type"] == "missing":
        return key, f"{key} is missing: {expects}."
    shown = item["input"]
    return key, f"{key} is {shown!r}; it takes {expects}."


def _nearest(word: str, known: Iterable[str], section: str = "") -> str:
    """' Did you mean ...?', looking in the named section first and then in all of them."""
    if section and word.lower() in _OTHER_NAMES:
        return f" Did you mean {_OTHER_NAMES[word.lower()]}?"
    names = {name: f"{section}.{name}" if section else name for name in known}
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {names[close[0]]}?"
    everywhere = {name: f"{other}.{name}" for other, cls in SECTIONS.items() for name in cls.model_fields}
    close = difflib.get_close_matches(word, everywhere, n=1, cutoff=0.75)
    if close:
        return f" Did you mean {everywhere[close[0]]}?"
    return f" {section or 'A recipe'} has {', '.join(known)}."
