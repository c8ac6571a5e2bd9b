"""The command line. The only place that prints results and sets exit codes; everything it does is also in Python.

Exit codes: 0 done; 2 you can fix it (recipe, data, model, hardware); 3 trained, but not pushed; 4 training diverged;
130 interrupted (143 by SIGTERM). Heavy libraries are imported by the verb that needs them, so `qlora --help` is instant.
"""

from __future__ import annotations

import argparse
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

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qlora.progress import Progress


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
        kept = " The same command starts, or goes on." if options.verb in ("train", "push") else ""
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
        from qlora.views import pushed_lines

        _compat.hide_loading_bars()
    result = train(recipe, progress, fresh=options.fresh, force=options.force)
    console = Console()
    for table in summary_tables(without_secrets(result.summary)):
        console.print(table)
    _print_lines([f"Report:  {result.report}", f"Adapter: {result.adapter}"])
    if result.push_error is not None:
        return _fail(result.push_error)
    if result.pushed is not None:
        _print_lines(pushed_lines(result.pushed))
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
    from qlora.plan_words import card_of, check_files, compared_cards, keep, make_plans, read_words, recipe_of
    from qlora.views import compare_view, plan_view

    source, overrides = read_words(options)
    progress = ConsoleProgress()
    check_files(options)
    devices = [card_of(options, progress)] if options.compare is None else compared_cards(options.compare, progress)
    recipe = None if source is None else recipe_of(options, source, overrides, progress)
    plans = make_plans(options, recipe, overrides, devices, progress)
    if options.json:
        documents = [plan.to_json() for plan in plans]
        _print_json(documents[0] if options.compare is None else documents)
    else:
        _print_view(plan_view(plans[0]) if options.compare is None else compare_view(plans))
    keep(options, plans, recipe, progress)
    return 0 if any(plan.fits for plan in plans) else 2


def _models(options: argparse.Namespace) -> int:
    from qlora.console import ConsoleProgress
    from qlora.plan_words import card_of, machine_of
    from qlora.views import models_view, num_parameters

    progress = ConsoleProgress()
    device = card_of(options, progress) or machine_of(options)
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


def _print_lines(lines: Sequence[str]) -> None:
    """Plain lines that a terminal may break and a pipe does not."""
    for line in lines:
        print(redact(line))


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


def _chat(options: argparse.Namespace) -> int:
    from qlora.chatting import Terminal, chat

    adapter, progress = _find_adapter(options)
    terminal = Terminal(input, lambda text: print(text, end="", flush=True), progress.note, sys.stdin.isatty())
    chat(adapter, terminal, progress, device=options.device, max_tokens=options.max_tokens, temperature=options.temperature)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from qlora.comparing import compare
    from qlora.views.comparison import comparison_view

    adapter, progress = _find_adapter(options)
    found = compare(adapter, data=options.data, num_rows=options.rows, device=options.device, progress=progress)
    _print_json(found.to_json()) if options.json else _print_view(comparison_view(found))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from qlora.merging import merge

    adapter, progress = _find_adapter(options)
    _print_lines(merge(adapter, options.out, into=options.into, dtype=options.dtype, max_shard_bytes=options.max_shard,
                       progress=progress).lines())
    return 0


def _find_adapter(options: argparse.Namespace) -> tuple[Any, Progress]:
    from qlora.console import ConsoleProgress
    from qlora.hub.fetch import find_adapter

    progress = ConsoleProgress()
    return find_adapter(options.source, revision=options.revision, base=options.base, progress=progress), progress


def _push(options: argparse.Namespace) -> int:
    from qlora.console import ConsoleProgress
    from qlora.hub.push import order_for, pack, push
    from qlora.views import parcel_view, pushed_lines

    progress = ConsoleProgress()
    order = order_for(Path(options.run), options.repo, public=options.public, revision=options.revision, tag=options.tag,
                      base_model=options.base_model, samples=options.samples, max_minutes=options.max_minutes)
    if options.dry_run:
        parcel = pack(order, progress)
        _print_view(parcel_view(parcel, order.target))
        print(parcel.card.content.decode())
        return 0
    _print_lines(pushed_lines(push(order, progress)))
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
          "chat": _chat, "eval": _eval, "merge": _merge, "push": _push}
