"""The command line. The only place that prints results and sets exit codes; everything it does is also in Python.

Exit codes: 0 done; 2 you can fix it (recipe, data, model, hardware); 3 trained, but not pushed; 4 training diverged;
130 interrupted (143 by SIGTERM). Heavy libraries are imported by the verb that needs them, so `qlora --help` is instant.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.arguments import build_parser, join_sizes
from qlora.errors import QloraError, RecipeError
from qlora.redact import redact
from qlora.units import MIB

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qlora.hardware import Device
    from qlora.planning.plan import Plan
    from qlora.progress import Progress
    from qlora.recipe import Recipe

# How a size looks where a card's name would do as well; nonsense such as -3GB is for `read_vram` to refuse.
_LIKE_A_SIZE = re.compile(r"[-+]?[\d.]+\s*([kmgt]i?b)?", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    words = join_sizes(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(words)
    # argparse takes no positional words after an option, but people write `qlora train recipe.yaml --debug lora.r=8`.
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.command = shlex.join(["qlora", *words])
    if options.verb is None:
        parser.print_help()
        return 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe or an old terminal may not know every sign; none is worth a crash
            stream.reconfigure(errors="replace")
    _compat.prepare_environment()
    if not options.debug:
        _compat.quieten_libraries()
    try:
        return _VERBS[options.verb](options)
    except QloraError as error:
        return _show_traceback(error.exit_code) if options.debug else _fail(error)
    except KeyboardInterrupt:
        kept = " The same command starts, or goes on." if options.verb == "train" else ""
        print(f"\nInterrupted.{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has gone; nobody is left to tell
        return 0
    except Exception:  # a mistake of ours: all that is known of it is shown, but for secrets
        return _show_traceback(1)


# --- the verbs ---------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qlora.console import ConsoleProgress
    from qlora.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    progress = ConsoleProgress()
    with progress.stage("Starting"):
        from qlora.results.report import without_secrets
        from qlora.results.summary import summary_tables
        from qlora.training.run import train

        _compat.hide_loading_bars()
    result = train(recipe, progress, fresh=options.fresh, force=options.force)
    console = Console()
    for table in summary_tables(without_secrets(result.summary)):
        console.print(table)
    console.print(f"Report:  {result.report}", highlight=False, soft_wrap=True)
    console.print(f"Adapter: {result.adapter}", highlight=False, soft_wrap=True)
    if result.push_error is not None:
        return _fail(result.push_error)
    if result.pushed_to:
        console.print(f"Pushed to {result.pushed_to}", highlight=False, soft_wrap=True)
    return 0


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qlora.console import ConsoleProgress
    from qlora.recipe import load_recipe
    from qlora.training.setup import check
    from qlora.views import data_view, plan_view, preflight_view

    recipe = load_recipe(options.recipe, options.overrides)
    console = Console()
    data, plan, checks = check(recipe, ConsoleProgress(), data_only=options.data_only)
    console.print(data_view(data))
    if plan is not None:
        for view in (plan_view(plan), preflight_view(checks)):
            console.print()
            console.print(view)
    bad = any(finding.level == "error" for finding in data.findings) or (plan is not None and not plan.fits)
    bad = bad or any(check.stops for check in checks)
    console.print("\nNot ready: see above." if bad else "\nReady to train.", style="bold red" if bad else "bold green")
    return 2 if bad else 0


def _plan(options: argparse.Namespace) -> int:
    from qlora.console import ConsoleProgress
    from qlora.views import compare_view, plan_view

    source, overrides = _words_of_plan(options)
    progress = ConsoleProgress()
    _check_files(options)
    devices = [_card(options, progress)] if options.compare is None else _compared(options.compare, progress)
    recipe = None if source is None else _recipe_to_plan(options, source, overrides, progress)
    plans = _plans(options, recipe, overrides, devices, progress)
    if options.json:
        documents = [plan.to_json() for plan in plans]
        _print_json(documents[0] if options.compare is None else documents)
    else:
        _print_view(plan_view(plans[0]) if options.compare is None else compare_view(plans))
    _keep(options, plans, recipe, progress)
    return 0 if any(plan.fits for plan in plans) else 2


def _words_of_plan(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The recipe, if one is named, and the overrides; refuses what contradicts itself."""
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


def _check_files(options: argparse.Namespace) -> None:
    """Places that cannot be written are found out before the planning."""
    if options.write:
        from qlora.results.frozen import refuse_existing

        refuse_existing(Path(options.write), force=options.force)
    if options.plot:
        from qlora.results.plan_plots import check_picture

        check_picture(Path(options.plot))


def _card(options: argparse.Namespace, progress: Progress) -> Device | None:
    """The card that is named, whether it is here or not; None for this machine."""
    if options.gpu is not None:
        return _named_card(options.gpu, options.vram, progress)
    return None if options.vram is None else _sized_card(options.vram, progress)


def _compared(text: str, progress: Progress) -> list[Device]:
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


def _recipe_to_plan(options: argparse.Namespace, source: str, overrides: list[str], progress: Progress) -> Recipe:
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


def _plans(
    options: argparse.Namespace, recipe: Recipe | None, overrides: list[str], devices: list[Device | None], progress: Progress
) -> list[Plan]:
    """One plan a device; None stands for this machine."""
    from qlora.training.planner import compare, plan_model, plan_recipe

    told = progress if options.compare is None else None  # a comparison has one bar over all cards

    def plan_for(device: Device | None) -> Plan:
        if recipe is not None:
            return plan_recipe(recipe, device=device, progress=told)
        return plan_model(options.model, device=device or _here(options), overrides=overrides, progress=told)

    return [plan_for(devices[0])] if options.compare is None else compare(plan_for, devices, progress)


def _here(options: argparse.Namespace) -> Device:
    from qlora.hardware import describe_machine

    return describe_machine("cpu" if getattr(options, "cpu", False) else "auto")


def _keep(options: argparse.Namespace, plans: list[Plan], recipe: Recipe | None, progress: Progress) -> None:
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


def _models(options: argparse.Namespace) -> int:
    from qlora.console import ConsoleProgress
    from qlora.views import models_view, num_parameters

    progress = ConsoleProgress()
    device = _card(options, progress) or _here(options)
    from qlora.training.planner import plan_catalog

    plans = sorted(plan_catalog(device, progress), key=lambda plan: (num_parameters(plan.model) or 0, plan.model))
    wanted = [plan for plan in plans if plan.fits or not options.fits]
    if options.json:
        _print_json([{"num_parameters": num_parameters(plan.model), **plan.to_json()} for plan in wanted])
    else:
        _print_view(models_view(wanted, num_planned=len(plans)))
    return 0 if any(plan.fits for plan in plans) else 2


def _print_json(document: Any) -> None:
    import json

    print(json.dumps(document, indent=2, default=str))


def _print_view(view: RenderableType) -> None:
    from rich.console import Console

    Console().print(view)


def _inspect(options: argparse.Namespace) -> int:
    from qlora.architecture import describe, find_config, inspection, select_targets
    from qlora.model.build import locate_base

    config = find_config(locate_base(options.model), inspect_only=True)
    architecture = describe(config)
    targets = options.targets if options.targets in ("all", "attention", "qv") else options.targets.split(",")
    found = {**inspection(architecture, select_targets(architecture, targets), options.r), "model": options.model}
    from qlora.views import inspection_view

    if options.json:
        _print_json(found)
    else:
        _print_view(inspection_view(found))
    return 0


def _cache(options: argparse.Namespace) -> int:
    from qlora.engine.shelf import bases_home, clear_stores, list_stores, size_of
    from qlora.home import cache_home
    from qlora.views import cache_view, cleared_view

    if options.action == "clear":
        if bool(options.names) == options.all:
            raise RecipeError("`qlora cache clear` wants the names of bases, or --all, and not both.",
                              "`qlora cache` lists what is kept.")
        cleared = clear_stores(None if options.all else options.names)
        _print_json(vars(cleared)) if options.json else _print_view(cleared_view(cleared))
        return 0
    if options.names or options.all:
        raise RecipeError("Names and --all say what to remove.", f"Write: qlora cache clear {' '.join(options.names) or '--all'}")
    stores, total_bytes = list_stores(), size_of(cache_home())
    if options.json:
        _print_json({"folder": str(bases_home()), "total_bytes": total_bytes, "bases": [vars(store) for store in stores]})
    else:
        _print_view(cache_view(stores, bases_home(), total_bytes))
    return 0


def _push(options: argparse.Namespace) -> int:
    from qlora.hub import find_adapter, push_adapter

    url = push_adapter(find_adapter(Path(options.folder)), options.repo, private=not options.public)
    print(f"Pushed to {url}")
    return 0


def _fail(error: QloraError) -> int:
    """One block on stderr: what is wrong, then what helps."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text("error: ", style="bold red").append(redact(error.problem), style="default"))
    if error.fix:
        console.print(Text(redact(error.fix)))
    return error.exit_code


def _show_traceback(exit_code: int) -> int:
    """Of the error that is being handled, as Python would show it, without secrets."""
    print(redact(traceback.format_exc()), end="", file=sys.stderr)
    return exit_code


_VERBS = {"train": _train, "check": _check, "plan": _plan, "models": _models, "inspect": _inspect, "cache": _cache,
          "push": _push}
