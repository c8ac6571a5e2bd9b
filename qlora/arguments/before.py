"""The verbs before and around a run: train, check, plan, models, inspect, cache."""

from __future__ import annotations

import argparse

from qlora.arguments.words import positive

_PLAN_DESCRIPTION = """\
Plan a run without weights and without the card: does it fit, what takes the memory, and which settings are best?
Exit code 0: it fits. 2: it does not, and what would is listed; with --compare, not on any card.
"""
_PLAN_EXAMPLES = """\
examples:
  qlora plan recipes/chat.yaml                             this recipe on this machine
  qlora plan recipes/chat.yaml --gpu "RTX 4060" lora.r=32  on a card that is not here, with the rank fixed
  qlora plan --model Qwen/Qwen3-8B --compare 8,12,24       a model, without data, on cards of three sizes
  qlora plan --model Qwen/Qwen3-8B --vram 8GB --write my.yaml   then: qlora train my.yaml data.path=my-rows.jsonl
"""
_MODELS_EXAMPLES = """\
examples:
  qlora models --vram 8GB                everything that the catalog holds, on a card of 8 GB
  qlora models --gpu "RTX 3060" --fits   only what fits
  qlora models --json                    on this machine, for a script
"""
_CACHE_DESCRIPTION = """\
A base is quantised once, into a file that every later run of it reads, so that the next start takes seconds. These files are
as large as the model in 4 bits. Without a word after it, this lists them: which base, how large, when it was used last.

What a run found out before its first step is kept too, a few kilobytes each: that its longest rows fit, and how good the bare base is
on the held-out rows, with its answers to them. A run with the same rows and shapes takes that over.
"""
_CACHE_EXAMPLES = """\
examples:
  qlora cache                          what is kept, and how much room it takes
  qlora cache clear Qwen/Qwen3-8B      remove a base, by its model or by the name in the last column
  qlora cache clear --all              remove all of them, and what runs found out before their first step

Nothing is lost: a base that is removed is made again by the run that needs it. One that is in use is left alone.
QLORA_CACHE names another place for the cache, such as a larger disk.
"""


def add_train(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Run a recipe."""
    train = verbs.add_parser(
        "train", parents=[common], help="run a recipe", formatter_class=_SettingsHelp,
        description="Run a recipe: plan, quantise, adapt, try out, train, evaluate, save and report.\n"
        "A run that was cut short goes on from its newest good checkpoint when the same command is given again, and comes to\n"
        "the same result. Ctrl-C saves a checkpoint first; a second one stops at once.",
    )
    _add_recipe(train)
    train.add_argument("--fresh", action="store_true", help="start anew beside a run that is there, instead of going on with it")
    train.add_argument("--force", action="store_true",
                       help="go on with a run although its settings or data are not what they were; the result is then neither's")
    train.set_defaults(verb="train")


def add_check(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Look at a recipe and its data."""
    check = verbs.add_parser(
        "check", parents=[common], help="check a recipe and its data, without weights",
        description="Check a recipe and its data: lengths, losses of rows, and three rows with the trained tokens marked. "
        "Reads the tokenizer, no weights.",
    )
    _add_recipe(check)
    check.add_argument("--data-only", action="store_true", help="do not load the tokenizer: rows and formats only")
    check.set_defaults(verb="check")


def add_plan(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """What fits."""
    plan = verbs.add_parser(
        "plan", parents=[common], help="what fits on a card, and with what settings; no weights, no card needed",
        usage="qlora plan (RECIPE | --model MODEL) [section.setting=value ...] [options]", description=_PLAN_DESCRIPTION,
        epilog=_PLAN_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("overrides", nargs="*", default=[], metavar="RECIPE section.setting=value",
                      help="a recipe, and settings to replace, e.g. lora.r=32")
    plan.add_argument("--model", metavar="MODEL",
                      help="instead of a recipe: a Hub id or a folder with config.json; plans without data, for rows of 2,048 "
                      "tokens unless data.max_length says otherwise")
    _add_card(plan)
    plan.add_argument("--cpu", action="store_true", help="on the CPU of this machine")
    plan.add_argument("--compare", metavar="CARDS",
                      help="one row a card: sizes in GB or names, such as 4,6,8,12 or \"RTX 3060,24\"")
    plan.add_argument("--json", action="store_true", help="print one JSON object; with --compare a list of them")
    plan.add_argument("--plot", metavar="FILE",
                      help="draw the memory by part and phase into a PNG file; with --compare by card")
    plan.add_argument("--write", metavar="FILE", help="write the plan as a recipe, every decided setting with its reason")
    plan.add_argument("--force", action="store_true", help="let --write replace a file")
    plan.set_defaults(verb="plan")


def add_models(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Which models fit."""
    models = verbs.add_parser(
        "models", parents=[common], help="which models of the catalog can be trained on a card",
        description="Plan every model of the catalog on one card, the smallest model first. The first time takes a while;\n"
        "plans are kept. Exit code 2 where nothing fits.",
        epilog=_MODELS_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_card(models)
    models.add_argument("--fits", action="store_true", help="leave out what does not fit")
    models.add_argument("--json", action="store_true", help="print a JSON list")
    models.set_defaults(verb="models")


def add_inspect(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Projections of a model."""
    inspect = verbs.add_parser(
        "inspect", parents=[common], help="list a model's projections and what an adapter would add",
        description="List the projections of a model, what target names hit, and how many parameters an adapter gets. Reads "
        "the config alone; the models of the catalog need no network.",
    )
    inspect.add_argument("model", help="a Hub id, a folder with config.json, or builtin:tiny")
    inspect.add_argument("--r", type=positive, default=16, metavar="N", help="rank (default: 16)")
    inspect.add_argument("--targets", default="all", help="all, attention, qv, or names: c_attn,c_proj (default: all)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(verb="inspect")


def add_cache(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Kept bases."""
    cache = verbs.add_parser(
        "cache", parents=[common], help="list the quantised bases that are kept on this disk, or remove them",
        usage="qlora cache [--json]\n       qlora cache clear NAME [NAME ...] | --all", description=_CACHE_DESCRIPTION,
        epilog=_CACHE_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list",
                       help="list (the default), or clear: remove what is named, without asking")
    cache.add_argument("names", nargs="*", metavar="NAME", help="bases to remove: a model, or a name from the list")
    cache.add_argument("--all", action="store_true", help="remove every base, and what runs found out before their first step")
    cache.add_argument("--json", action="store_true", help="print one JSON object")
    cache.set_defaults(verb="cache")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.setting=value", help="replace a setting, e.g. lora.r=32")


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vram", metavar="SIZE", help="a card with so much memory, such as 8GB; with --gpu, a variant of it")
    parser.add_argument("--gpu", metavar="NAME", help='a card by name, such as "RTX 4060" (default: this machine)')


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
