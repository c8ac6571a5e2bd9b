"""The command line. The only place that prints results and sets exit codes; everything it does is also in Python.

Exit codes: 0 done; 2 you can fix it (recipe, data, model, hardware); 3 trained, but not pushed; 4 training diverged;
130 interrupted (143 by SIGTERM). Heavy libraries are imported by the verb that needs them, so `qlora --help` is instant.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import _compat
from qlora.arguments import build_parser, join_sizes
from qlora.errors import ModelError, QloraError, RecipeError
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
        kept = " The same command starts, or goes on." if options.verb in ("train", "push", "sweep", "measure") else ""
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
    from qlora.home import cache_home, starts_home
    from qlora.views import cache_view, cleared_view

    if options.action == "clear":
        if bool(options.names) == options.all:
            raise RecipeError("`qlora cache clear` wants the names of bases, or --all, and not both.",
                              "`qlora cache` lists what is kept.")
        cleared = clear_stores(None if options.all else options.names)
        if options.all:
            shutil.rmtree(starts_home(), ignore_errors=True)
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


def _sweep(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qlora.console import ConsoleProgress
    from qlora.recipe import load_recipe

    recipe, progress = load_recipe(options.recipe, options.overrides), ConsoleProgress()
    with progress.stage("Starting"):
        from qlora.sweeping import read_order, sweep
        from qlora.sweeping.preview import preview
        from qlora.views.sweep import preview_view, sweep_view

        _compat.hide_loading_bars()
    order = read_order(recipe, grid=options.grid, space=options.space, num_seeds=options.seeds, num_trials=options.trials,
                       out=options.out, keep=options.keep)
    if options.dry_run:
        planned = preview(order, progress)
        _print_json(asdict(planned)) if options.json else _print_view(preview_view(planned))
        return 0 if any(point.fits for point in planned.points) else 2
    found = sweep(order, progress)
    if options.json:
        _print_json(found.to_json())
        return 0
    console = Console()
    console.print(sweep_view(found, console.width))
    _print_lines([*([f"Train it: {found.command}"] if found.command else []), f"Report:   {Path(found.folder) / 'sweep.md'}"])
    return 0


def _chat(options: argparse.Namespace) -> int:
    from qlora.chatting import Terminal, chat

    adapters, progress = _find_adapters(options)
    typed, seen = (stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))

    def read(prompt: str) -> str:
        if sys.stdin is None:  # closed before we began
            raise EOFError
        if seen or not typed:
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # answers go into a file or a pipe, and prompts do not belong there
        return input()

    def write(text: str) -> None:
        print(text, end="", flush=True)

    terminal = Terminal(read, write, progress.note, typed, progress.aside)
    chat(adapters, terminal, progress, device=options.device, max_tokens=options.max_tokens, temperature=options.temperature,
         seed=options.seed, system=options.system)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from qlora.comparing import compare
    from qlora.views.comparison import comparison_view

    adapters, progress = _find_adapters(options)
    found = compare(adapters, data=options.data, num_rows=options.rows, num_answers=options.answers, device=options.device,
                    progress=progress)
    if options.json or options.per_row:
        _print_json(found.to_json(per_row=options.per_row))
    else:
        _print_view(comparison_view(found, options.samples))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from qlora.merging import merge, plan_merge

    adapter, progress = _find_adapter(options)
    _print_lines((plan_merge if options.dry_run else merge)(
        adapter, options.out, into=options.into, dtype=options.dtype, max_shard_bytes=options.max_shard, progress=progress,
    ).lines())
    return 0


def _export(options: argparse.Namespace) -> int:
    from qlora.exporting import export, find_format, plan_export

    find_format(options.form or "f16")  # a slip of the pen is told before anything is fetched
    adapter, progress = _find_adapter(options)
    _print_lines((plan_export if options.dry_run else export)(
        adapter, options.out, form=options.form, adapter_only=options.adapter_only, into=options.into, progress=progress).lines())
    return 0


def _find_adapters(options: argparse.Namespace) -> tuple[list[Any], Progress]:
    from qlora.console import ConsoleProgress
    from qlora.hub.fetch import find_adapter

    if options.revision is not None and len(options.sources) > 1:
        raise ModelError("--revision says which version of one adapter is meant, and several are named.",
                         f"Write it behind its name: {options.sources[0]}@{options.revision}")
    progress = ConsoleProgress()
    return [find_adapter(source, revision=options.revision, base=options.base, progress=progress)
            for source in options.sources], progress


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


def _measure(options: argparse.Namespace) -> int:
    from qlora.console import ConsoleProgress
    from qlora.measuring.default_cells import cells_for
    from qlora.measuring.flow import Order, measure, planned_lines
    from qlora.measuring.lines import adopt_receipts, need_lines
    from qlora.planning.receipts import Receipts

    progress = ConsoleProgress()
    if options.receipts:
        receipts = Receipts.load()
        for path in map(Path, options.receipts):
            num_found, num_new = adopt_receipts(path, receipts)
            _print_lines([f"{path}: {num_found} measurements, {num_new} of them new; kept in {receipts.path}"])
        return 0
    if options.summary:
        return _show_measured(need_lines([Path(path) for path in options.summary]), options)
    order = Order(Path(options.out), options.cpu, options.try_refused, options.minutes, options.jobs, options.timeout)
    cells, here = cells_for(options.overrides, options.cells, options.vram, plan_only=options.plan_only, cpu=options.cpu)
    lines = planned_lines(cells, order, progress, here=here) if options.plan_only else measure(cells, order, progress)
    return _show_measured(lines, options)


def _show_measured(lines: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    from qlora.measuring.summary import markdown_tables, summaries
    from qlora.views.measured import measured_view, plans_view, summary_view

    if options.json:
        _print_json({"lines": lines, "summaries": [found.to_json() for found in summaries(lines)]})
    elif options.markdown:
        print(markdown_tables(lines))
    elif lines:
        _print_view(plans_view(lines) if options.plan_only else summary_view(lines) if options.summary else measured_view(lines))
    return 2 if any("error" in line for line in lines) and not options.summary else 0


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
          "sweep": _sweep, "chat": _chat, "eval": _eval, "merge": _merge, "export": _export, "push": _push,
          "measure": _measure}
