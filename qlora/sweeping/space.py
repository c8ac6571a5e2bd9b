"""What a sweep goes through: the settings that are searched, their values, and what a trial of them is called."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qlora import guidance
from qlora.errors import RecipeError
from qlora.recipe import Recipe

Values = dict[str, Any]
"""One value for each setting that is searched, as a person writes it: {"lora.r": 8, "lora.alpha": "2r"}."""

GUIDED = ("lora.r", "lora.alpha", "lora.targets")
_SECTIONS = ("lora", "train", "memory")
_TIMES_R = re.compile(r"(\d+(?:\.\d+)?)?r")
_POLICY_OF = {factor: name for name, (factor, _) in guidance.ALPHA_POLICIES.items()}
_MOST_POINTS = 1_000
_MAX_NAME = 80  # characters; file systems take 255, and a path has other parts


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: whole ones evenly, others on a logarithmic scale where `low` is above 0."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = dict[str, tuple[Any, ...] | Range]


# --- reading -----------------------------------------------------------------------------------------------------------


def guided_space(recipe: Recipe) -> Space:
    """The settings of guidance's search order, but for those that were given on the command line, which stay as they are.

    Raises:
        RecipeError: all of them were given.
    """
    fixed = {override.partition("=")[0].strip() for override in recipe.overrides}
    space: Space = {
        "lora.r": guidance.SWEEP_RANKS,
        "lora.alpha": tuple(_times_r(guidance.ALPHA_POLICIES[name][0]) for name in guidance.SWEEP_POLICIES),
        "lora.targets": guidance.SWEEP_TARGETS,
    }
    space = {key: values for key, values in space.items() if key not in fixed}
    if not space:
        raise RecipeError(f"{', '.join(GUIDED)} are all given on the command line, so there is nothing left to search.",
                          "Leave one of them out, or name values: --grid lora.r=8,16,32")
    return space


def read_space(words: Sequence[str], recipe: Recipe, *, ranges: bool) -> Space:
    """`section.setting=value,value` for each word; with `ranges`, `low..high` as well.

    Raises:
        RecipeError: nothing to go through, an unknown setting or a value that it does not take, one that is also given on the
            command line, or one with which losses could not be compared.
    """
    option = "--space" if ranges else "--grid"
    if not words:
        raise RecipeError(f"{option} is empty.", f"Write what to go through: {option} lora.r=8,16,32 lora.alpha=r,2r")
    space: Space = {}
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not text:
            raise RecipeError(f"{option} {word!r} has no values.", f"Write them with commas between: {key or 'lora.r'}=8,16,32")
        _refuse_key(key, option, recipe)
        if key in space:
            raise RecipeError(f"{option} names {key} twice.", "Write all of its values after one =.")
        space[key] = _range(text) if ranges and ".." in text else _list(key, text)
    for values in _corners(space):
        recipe.with_overrides(overrides_of(values, recipe))  # names every setting and value that is none
    num = math.prod(len(values) for values in space.values() if isinstance(values, tuple))
    if not ranges and num > _MOST_POINTS:
        raise RecipeError(f"This grid has {num:,} combinations; it may have {_MOST_POINTS:,}.",
                          "Leave some values out, or draw from them with --space and --trials.")
    return space


def grid_points(space: Space) -> Iterator[Values]:
    """Every combination, the last setting changing first."""
    for values in itertools.product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _refuse_key(key: str, option: str, recipe: Recipe) -> None:
    section = key.partition(".")[0]
    if key == "train.seed":
        raise RecipeError(f"{option} names train.seed.", "Every trial runs with several seeds: --seeds N says with how many.")
    if section in ("data", "model", "output", "hub"):
        raise RecipeError(f"{option} names {key}, and with another {section} section held-out losses cannot be compared.",
                          f"A sweep goes through settings of {', '.join(_SECTIONS)}.")
    if key in {override.partition("=")[0].strip() for override in recipe.overrides}:
        raise RecipeError(f"{key} is given on the command line and in {option}.", "Write it once.")


def _list(key: str, text: str) -> tuple[Any, ...]:
    """Values between commas; those inside brackets belong to a list."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    if not all(parts):
        raise RecipeError(f"{key}={text} has a value that is empty.",
                          f"Write {key}={','.join(part for part in parts if part) or '8,16'}.")
    values = tuple(_value(part) for part in parts)
    if len(set(values)) < len(values):
        raise RecipeError(f"{key}={text} names a value twice.", "Write each once.")
    return values


def _value(text: str) -> Any:
    """A number or a switch where it reads as one, else the text; lists stay texts."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:  # YAML takes 1e-4 for a text
            return float(value)
        except ValueError:
            return text
    return value if isinstance(value, bool | int | float) else text


def _range(text: str) -> Range:
    low, high = (_value(part.strip()) for part in text.split("..", 1))
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in (low, high))
    if not numbers or low >= high:
        raise RecipeError(f"{text} is not a range.", "Write two numbers, the lower one first: train.learning_rate=1e-4..5e-4")
    return Range(low, high)


def _corners(space: Space) -> Iterator[Values]:
    """Points that have every value that can be written in them."""
    lists = {key: (values.low, values.high) if isinstance(values, Range) else values for key, values in space.items()}
    for i in range(max(map(len, lists.values()))):
        yield {key: values[min(i, len(values) - 1)] for key, values in lists.items()}


def largest_point(space: Space) -> Values:
    """The point that takes most memory as far as numbers tell: of each setting the highest, or the last."""
    def most(values: tuple[Any, ...] | Range) -> Any:
        if isinstance(values, Range):
            return values.high
        numbers = all(isinstance(value, int | float) for value in values)
        return max(values) if numbers else values[-1]

    return {key: most(values) for key, values in space.items()}


# --- a point as settings -----------------------------------------------------------------------------------------------


def settings_of(values: Mapping[str, Any], recipe: Recipe) -> Values:
    """The settings as a recipe takes them: alpha of "2r" becomes a number, or a policy where the rank is not known yet.

    Raises:
        RecipeError: a multiple of an unknown rank for which there is no policy.
    """
    settings = dict(values)
    match = _TIMES_R.fullmatch(str(settings.get("lora.alpha", "")))
    if match:
        factor, r = float(match[1] or 1), settings.get("lora.r", recipe.lora.r)
        if isinstance(r, int):
            alpha = factor * r
            settings["lora.alpha"] = int(alpha) if alpha == int(alpha) else alpha
        elif factor in _POLICY_OF:
            settings["lora.alpha"] = _POLICY_OF[factor]
        else:
            raise RecipeError(f"lora.alpha={values['lora.alpha']} needs a rank, and lora.r is {r}.", "Give lora.r as well.")
    return settings


def overrides_of(values: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The settings as they are written on the command line."""
    return [f"{key}={_text(value)}" for key, value in settings_of(values, recipe).items()]


def name_of(values: Mapping[str, Any], recipe: Recipe) -> str:
    """What a trial is called, as a folder: "r8-alpha16-all"."""
    parts = [_text(value) if key == "lora.targets" else f"{key.partition('.')[2]}{_text(value)}"
             for key, value in settings_of(values, recipe).items()]
    plain = "-".join(parts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)[:_MAX_NAME]
    return name if name == plain else f"{name}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def _times_r(factor: int) -> str:
    return "r" if factor == 1 else f"{factor}r"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value!r}" if isinstance(value, float) else str(value)
