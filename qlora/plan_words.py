"""What the words after `qlora plan` and `qlora models` ask for: cards, a recipe, plans, and files to keep them in."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import RecipeError
from qlora.units import MIB

if TYPE_CHECKING:
    from qlora.hardware import Device
    from qlora.planning.plan import Plan
    from qlora.progress import Progress
    from qlora.recipe import Recipe

# How a size looks where a card's name would do as well; nonsense such as -3GB is for `read_vram` to refuse.
_LIKE_A_SIZE = re.compile(r"[-+]?[\d.]+\s*([kmgt]i?b)?", re.IGNORECASE)


def read_words(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The recipe, if one is named, and the overrides.

    Raises:
        RecipeError: words that contradict each other.
    """
    overrides = [word for word in options.overrides if "=" in word]
    named = [word for word in options.overrides if "=" not in word]
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)} are both taken for recipes; one is planned at a time.",
                          "Overrides are written section.setting=value, for example lora.r=32.")
    if named and options.model:
        raise RecipeError(f"Both the recipe {named[0]} and --model {options.model} are named.",
                          f"To plan the recipe with another model: qlora plan {named[0]} model.base={options.model}")
    if not named and not options.model:
        raise RecipeError("There is nothing to plan.",
                          "Name a recipe, or a model: qlora plan --model Qwen/Qwen3-8B --vram 8GB")
    rows = [word for word in overrides if options.model and word.startswith(("data=", "data.path="))]
    if rows:
        raise RecipeError(f"{rows[0]} names rows, but --model plans without any.",
                          "Put both into a recipe (two lines: model and data) and plan that.")
    card = [flag for flag, value in (("--vram", options.vram), ("--gpu", options.gpu)) if value is not None]
    if options.cpu and card:
        raise RecipeError(f"--cpu and {card[0]} name two devices.",
                          "Leave one out; memory.budget=8GB says how much RAM a run on the CPU may take.")
    if options.compare is not None and (card or options.cpu):
        raise RecipeError(f"--compare names cards, and so does {card[0] if card else '--cpu'}.",
                          'Put every card into --compare, such as --compare "8,12,RTX 4090".')
    if options.compare is not None and options.write:
        raise RecipeError("--compare makes several plans, and --write keeps one.", "Leave --compare out and name one card.")
    return named[0] if named else None, overrides


def check_files(options: argparse.Namespace) -> None:
    """Places that cannot be written are found out before the planning.

    Raises:
        OutputError: one of --write and --plot is such a place.
    """
    if options.write:
        from qlora.results.frozen import refuse_existing

        refuse_existing(Path(options.write), force=options.force)
    if options.plot:
        from qlora.results.plan_plots import check_picture

        check_picture(Path(options.plot))


def card_of(options: argparse.Namespace, progress: Progress) -> Device | None:
    """The card that is named, whether it is here or not; None for this machine."""
    if options.gpu is not None:
        return _named_card(options.gpu, options.vram, progress)
    return None if options.vram is None else _sized_card(options.vram, progress)


def compared_cards(text: str, progress: Progress) -> list[Device]:
    """The cards of --compare: sizes and names, in the order given."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError("--compare names no card.", "Write sizes or names: --compare 4,8,12 or --compare \"RTX 3060,24GB\".")
    bare = [word for word in words if re.fullmatch(r"[\d.]+", word)]
    devices = [_sized_card(f"{word}GB" if word in bare else word, progress) if _LIKE_A_SIZE.fullmatch(word)
               else _named_card(word, None, progress) for word in words]
    if bare:
        progress.note(f"{', '.join(bare)}: read as sizes in GB.")
    return devices


def _named_card(name: str, vram: str | None, progress: Progress) -> Device:
    """A card of the table; a size picks the variant, or the part of it that may be used."""
    from qlora.catalog.cards import find_card
    from qlora.hardware import device_from_card

    vram_bytes = None if vram is None else _read_vram(vram, progress)
    card = find_card(name, None if vram_bytes is None else vram_bytes // MIB)
    if card.note:
        progress.note(card.note)
    return device_from_card(card, vram_bytes)


def _sized_card(vram: str, progress: Progress) -> Device:
    from qlora.hardware import device_from_card

    return device_from_card(None, _read_vram(vram, progress))


def _read_vram(text: str, progress: Progress) -> int:
    from qlora.planning.budget import read_vram

    vram_bytes, note = read_vram(text)
    if note:
        progress.note(note)
    return vram_bytes


def recipe_of(options: argparse.Namespace, source: str, overrides: list[str], progress: Progress) -> Recipe:
    """The recipe, for the device that is named. Device and budget in the file are those of another machine, then."""
    from qlora.recipe import load_recipe

    recipe = load_recipe(source, [*overrides, *(["memory.device=cpu"] if options.cpu else [])])
    if options.compare is None and options.vram is None and options.gpu is None:
        return recipe
    given_here = {word.partition("=")[0] for word in overrides}
    values = {f"memory.{name}": getattr(recipe.memory, name) for name in ("device", "budget")}
    replaced = {key: value for key, value in values.items() if value != "auto" and key not in given_here}
    for key, value in replaced.items():
        progress.note(f"The recipe says {key}: {value}; the card that is named here counts instead.")
    return recipe.replace(dict.fromkeys(replaced, "auto")) if replaced else recipe


def make_plans(
    options: argparse.Namespace, recipe: Recipe | None, overrides: list[str], devices: list[Device | None], progress: Progress
) -> list[Plan]:
    """One plan a device; None stands for this machine."""
    from qlora.training.planner import compare, plan_model, plan_recipe

    told = progress if options.compare is None else None  # a comparison has one bar over all cards

    def plan_for(device: Device | None) -> Plan:
        if recipe is not None:
            return plan_recipe(recipe, device=device, progress=told)
        return plan_model(options.model, device=device or machine_of(options), overrides=overrides, progress=told)

    return [plan_for(devices[0])] if options.compare is None else compare(plan_for, devices, progress)


def machine_of(options: argparse.Namespace) -> Device:
    """This machine, or its CPU where that is asked for."""
    from qlora.hardware import describe_machine

    return describe_machine("cpu" if getattr(options, "cpu", False) else "auto")


def keep(options: argparse.Namespace, plans: list[Plan], recipe: Recipe | None, progress: Progress) -> None:
    """What --plot and --write leave on disk."""
    if options.plot:
        from qlora.results.plan_plots import draw_compare, draw_plan

        path = Path(options.plot)
        draw_plan(plans[0], path) if options.compare is None else draw_compare(plans, path)
        progress.note(f"Drew {path}")
    if options.write:
        from qlora.results.frozen import write_frozen

        write_frozen(plans[0], Path(options.write), recipe=recipe, command=options.command, force=options.force)
        progress.note(f"Wrote {options.write}. To train it: {shlex.join(['qlora', 'train', options.write])}")
