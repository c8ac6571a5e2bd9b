"""The command line. The only place that prints results and sets exit codes; everything it does is also in Python.

Exit codes: 0 done; 2 you can fix it (recipe, data, model, hardware); 3 trained, but not pushed; 4 training diverged;
130 interrupted. Heavy libraries are imported by the verb that needs them, so `qlora --help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora import __version__, _compat
from qlora.errors import QloraError

_DESCRIPTION = """\
Fine-tune a large language model on one small GPU: a frozen 4-bit base, trainable 16-bit LoRA adapters.

  qlora train recipes/quickstart.yaml            a first run, on a GPU or a CPU, without network
  qlora check recipes/chat.yaml                  is the data right? no weights needed
  qlora inspect Qwen/Qwen3-0.6B --r 16           what would be adapted, and how large is it?
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positional words after an option, but people write `qlora train recipe.yaml --debug lora.r=8`.
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if options.run is None:
        parser.print_help()
        return 0
    _compat.prepare_environment()
    if not options.debug:
        _compat.quieten_libraries()
    try:
        return options.run(options)
    except QloraError as error:
        if options.debug:
            raise
        return _fail(error)
    except KeyboardInterrupt:
        print("\nInterrupted. Checkpoints that were written are in the run folder.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has gone; nobody is left to tell
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`qlora VERB --help` explains a verb; `qlora train --help` lists every setting of a recipe.",
    )
    parser.add_argument("--version", action="version", version=f"qlora {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    parser.set_defaults(run=None, debug=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    train = verbs.add_parser(
        "train", parents=[common], help="run a recipe", formatter_class=_SettingsHelp,
        description="Run a recipe: plan, quantise, adapt, train, evaluate, save and report.",
    )
    _add_recipe(train)
    train.set_defaults(run=_train)

    check = verbs.add_parser(
        "check", parents=[common], help="check a recipe and its data, without weights",
        description="Check a recipe and its data: lengths, losses of rows, and three rows with the trained tokens marked. "
        "Reads the tokenizer, no weights.",
    )
    _add_recipe(check)
    check.add_argument("--data-only", action="store_true", help="do not load the tokenizer: rows and formats only")
    check.set_defaults(run=_check)

    inspect = verbs.add_parser(
        "inspect", parents=[common], help="list a model's projections and what an adapter would add",
        description="List the projections of a model, what target names hit, and how many parameters an adapter gets. Reads "
        "the config alone; the models of the catalog need no network.",
    )
    inspect.add_argument("model", help="a Hub id, a folder with config.json, or builtin:tiny")
    inspect.add_argument("--r", type=_positive, default=16, metavar="N", help="rank (default: 16)")
    inspect.add_argument("--targets", default="all", help="all, attention, qv, or names: c_attn,c_proj (default: all)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    push = verbs.add_parser(
        "push", parents=[common], help="send a run's adapter to the Hub",
        description="Send the adapter of a finished run to the Hub. Running it again finishes what was broken off.",
    )
    push.add_argument("folder", metavar="RUN", help="a run folder, or its adapter/ folder")
    push.add_argument("repo", help="name or owner/name")
    push.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    push.set_defaults(run=_push)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.setting=value", help="replace a setting, e.g. lora.r=32")


class _SettingsHelp(argparse.RawDescriptionHelpFormatter):
    """Help that ends with every setting, from the recipe's declarations."""

    def format_help(self) -> str:
        shown = super().format_help()
        if "options:" not in shown:  # argparse asks for the usage line alone through the same method
            return shown
        from qlora.settings import describe_settings

        lines = [shown, "settings (section.setting = default):"]
        for doc in describe_settings():
            lines += [f"  {doc.key} = {doc.default}", f"      {doc.help}", f"      Takes {doc.expects}."]
        return "\n".join(lines) + "\n"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


# --- the verbs ---------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qlora.console import ConsoleProgress
    from qlora.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    progress = ConsoleProgress()
    with progress.stage("Starting"):
        from qlora.results.summary import summary_tables
        from qlora.training.run import train

        _compat.hide_loading_bars()
    result = train(recipe, progress)
    console = Console()
    for table in summary_tables(result.summary):
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
    from qlora.views import data_view, plan_view

    recipe = load_recipe(options.recipe, options.overrides)
    console = Console()
    data, plan = check(recipe, ConsoleProgress(), data_only=options.data_only)
    console.print(data_view(data))
    if plan is not None:
        console.print()
        console.print(plan_view(plan))
    bad = any(finding.level == "error" for finding in data.findings)
    console.print("\nNot ready: see the errors above." if bad else "\nReady to train.", style="bold red" if bad else "bold green")
    return 2 if bad else 0


def _inspect(options: argparse.Namespace) -> int:
    from qlora.architecture import describe, find_config, inspection, select_targets
    from qlora.model.build import locate_base

    config = find_config(locate_base(options.model), inspect_only=True)
    architecture = describe(config)
    targets = options.targets if options.targets in ("all", "attention", "qv") else options.targets.split(",")
    found = {**inspection(architecture, select_targets(architecture, targets), options.r), "model": options.model}
    if options.json:
        import json

        print(json.dumps(found, indent=2))
        return 0
    from rich.console import Console

    from qlora.views import inspection_view

    Console().print(inspection_view(found))
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
    console.print(Text("error: ", style="bold red").append(error.problem, style="default"))
    if error.fix:
        console.print(Text(error.fix))
    return error.exit_code
