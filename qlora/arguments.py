"""What may be written after `qlora`: the verbs, their options and their help. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from qlora import __version__
from qlora.errors import RecipeError
from qlora.units import parse_size

_DESCRIPTION = """\
Fine-tune a large language model on one small GPU: a frozen 4-bit base, trainable 16-bit LoRA adapters.

  qlora train recipes/quickstart.yaml            a first run, on a GPU or a CPU, without network
  qlora plan --model Qwen/Qwen3-8B --vram 8GB    what can be trained on this card, and with what settings?
  qlora check recipes/chat.yaml                  is the data right? no weights needed
  qlora inspect Qwen/Qwen3-0.6B --r 16           what would be adapted, and how large is it?
  qlora push runs/chat me/my-adapter             share a finished run: adapter, model card, report
  qlora chat me/my-adapter                       talk to an adapter, of a run or from the Hub; eval and merge take the same
"""
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
"""
_CACHE_EXAMPLES = """\
examples:
  qlora cache                          what is kept, and how much room it takes
  qlora cache clear Qwen/Qwen3-8B      remove a base, by its model or by the name in the last column
  qlora cache clear --all              remove all of them

Nothing is lost: a base that is removed is made again by the run that needs it. One that is in use is left alone.
QLORA_CACHE names another place for the cache, such as a larger disk.
"""
_PUSH_DESCRIPTION = """\
Send a finished run to the Hub: adapter, tokenizer, chat template, a model card, the report with its plots, settings and plan.
Never checkpoints, optimizer state or data. The repository is private unless --public is given.

Everything becomes visible in one commit, or nothing does; then the server's sizes and checksums are held against the files here.
The run folder is not touched. Running it again finishes what was broken off, and changes nothing where all is there.
"""
_PUSH_EXAMPLES = """\
examples:
  qlora push runs/chat --dry-run              what would be sent, and the model card
  qlora push runs/chat me/chat-adapter        then: qlora chat me/chat-adapter
  qlora push runs/chat-2 me/chat-adapter --tag v2

Log in once with `hf auth login` and a token of the kind write, or set HF_TOKEN. HF_ENDPOINT names a Hub of your own.
A recipe pushes by itself with a line `hub: me/chat-adapter`; that is looked into before training. Exit code 3: not pushed,
nothing lost, and the message has the command that finishes it.
"""


def build_parser() -> argparse.ArgumentParser:
    """A parser whose result has `verb`, None where none was written, and that verb's own words."""
    parser = argparse.ArgumentParser(
        prog="qlora", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`qlora VERB --help` explains a verb; `qlora train --help` lists every setting of a recipe.",
    )
    parser.add_argument("--version", action="version", version=f"qlora {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    parser.set_defaults(verb=None, debug=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

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

    check = verbs.add_parser(
        "check", parents=[common], help="check a recipe and its data, without weights",
        description="Check a recipe and its data: lengths, losses of rows, and three rows with the trained tokens marked. "
        "Reads the tokenizer, no weights.",
    )
    _add_recipe(check)
    check.add_argument("--data-only", action="store_true", help="do not load the tokenizer: rows and formats only")
    check.set_defaults(verb="check")

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

    inspect = verbs.add_parser(
        "inspect", parents=[common], help="list a model's projections and what an adapter would add",
        description="List the projections of a model, what target names hit, and how many parameters an adapter gets. Reads "
        "the config alone; the models of the catalog need no network.",
    )
    inspect.add_argument("model", help="a Hub id, a folder with config.json, or builtin:tiny")
    inspect.add_argument("--r", type=_positive, default=16, metavar="N", help="rank (default: 16)")
    inspect.add_argument("--targets", default="all", help="all, attention, qv, or names: c_attn,c_proj (default: all)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(verb="inspect")

    cache = verbs.add_parser(
        "cache", parents=[common], help="list the quantised bases that are kept on this disk, or remove them",
        usage="qlora cache [--json]\n       qlora cache clear NAME [NAME ...] | --all", description=_CACHE_DESCRIPTION,
        epilog=_CACHE_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list",
                       help="list (the default), or clear: remove what is named, without asking")
    cache.add_argument("names", nargs="*", metavar="NAME", help="bases to remove: a model, or a name from the list")
    cache.add_argument("--all", action="store_true", help="remove every base")
    cache.add_argument("--json", action="store_true", help="print one JSON object")
    cache.set_defaults(verb="cache")

    _add_chat(verbs, common)
    _add_eval(verbs, common)
    _add_merge(verbs, common)
    push = verbs.add_parser(
        "push", parents=[common], help="send a finished run's adapter to the Hub",
        description=_PUSH_DESCRIPTION, epilog=_PUSH_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    push.add_argument("run", metavar="RUN", help="the folder of a finished run")
    push.add_argument("repo", nargs="?", metavar="REPO",
                      help="name or owner/name (default: hub.repo of the run's recipe, else the run's name)")
    push.add_argument("--dry-run", action="store_true", help="show the files, their sizes and the model card; send nothing")
    push.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is not there (default: main)")
    push.add_argument("--tag", metavar="NAME", help="name for this version, such as v1; a tag that is there is never moved")
    push.add_argument("--base-model", metavar="ID", help="what the base is called on the Hub, where it was a folder")
    push.add_argument("--samples", action="store_true", help="send the report's held-out prompts and answers as well")
    push.add_argument("--max-minutes", type=_minutes, metavar="N", help="give up after so long (default: 60)")
    push.set_defaults(verb="push")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.setting=value", help="replace a setting, e.g. lora.r=32")


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vram", metavar="SIZE", help="a card with so much memory, such as 8GB; with --gpu, a variant of it")
    parser.add_argument("--gpu", metavar="NAME", help='a card by name, such as "RTX 4060" (default: this machine)')


def join_sizes(words: Sequence[str]) -> list[str]:
    """`--vram -3GB` as one word: argparse would take the size for an option, and our message says more than its own."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--vram", "--compare") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


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


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


_CHAT_EXAMPLES = """\
examples:
  qlora chat runs/quickstart              the adapter of a run, or of any folder
  qlora chat me/my-adapter@v2             from the Hub, at a branch, tag or commit; its base is found from its own config
  echo "Hello" | qlora chat me/my-adapter     one line is one turn, and only answers are printed

In the chat: /base switches the adapter off and on, /reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer.
"""
_EVAL_EXAMPLES = """\
examples:
  qlora eval runs/quickstart                        on the rows that the run held out
  qlora eval me/my-adapter --data rows.jsonl        on rows of your own
  qlora eval runs/quickstart --rows 100 --json      for a script
"""


def _add_chat(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    chat = verbs.add_parser(
        "chat", parents=[common], help="talk to an adapter, from a folder or from the Hub", epilog=_CHAT_EXAMPLES,
        description="Load an adapter on its 4-bit base and talk to it.", formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_adapter(chat)
    chat.add_argument("--max-tokens", type=_positive, default=512, metavar="N", help="of an answer, at most (default: 512)")
    chat.add_argument("--temperature", type=_temperature, default=0.0, metavar="T",
                      help="0 takes the most probable word each time (default); 0.7 varies")
    chat.set_defaults(verb="chat")


def _add_eval(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    evaluate = verbs.add_parser(
        "eval", parents=[common], help="measure an adapter beside its base", epilog=_EVAL_EXAMPLES,
        description="Loss, perplexity and exact match of an adapter and of its bare base, on the same rows.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_adapter(evaluate)
    evaluate.add_argument("--data", metavar="FILE", help="rows to measure on; of a run folder, those that it held out (default)")
    evaluate.add_argument("--rows", type=_positive, metavar="N", help="at most so many rows")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(verb="eval")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE",
                        help="a run folder, an adapter folder, or owner/name on the Hub, maybe with @revision")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of an adapter on the Hub (default: main)")
    parser.add_argument("--base", metavar="MODEL", help="the base: a Hub id or a folder (default: what the adapter names)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where it runs (default: a GPU if there is one)")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 10")
    return value


_MERGE_DESCRIPTION = """\
Write an adapter and its base as one model, which loads without PEFT. It is written tensor by tensor, so that it takes little RAM,
and then held against base and adapter. OUT is there whole or not at all.
"""
_MERGE_EXAMPLES = """\
--into 16bit   adds the adapter to the base's original weights (default), which are finer than the 4-bit ones of its training.
--into nf4     adds it to the weights as 4 bits left them in training, stored in 16 bits: what was trained, and no smaller.

examples:
  qlora merge runs/quickstart                       into the folder quickstart-merged
  qlora merge me/my-adapter merged --dtype fp16     from the Hub; for cards without bf16
"""


def _add_merge(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    merge = verbs.add_parser(
        "merge", parents=[common], help="write adapter and base as one model", description=_MERGE_DESCRIPTION,
        epilog=_MERGE_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    merge.add_argument("source", metavar="SOURCE",
                       help="a run folder, an adapter folder, or owner/name on the Hub, maybe with @revision")
    merge.add_argument("out", metavar="OUT", nargs="?", help="a new folder (default: NAME-merged, in this folder)")
    merge.add_argument("--into", choices=("16bit", "nf4"), default="16bit", help="which weights of the base: see below")
    merge.add_argument("--base", metavar="MODEL", help="the base, a Hub id or a folder (default: the one that the adapter names)")
    merge.add_argument("--revision", metavar="R", help="branch, tag or commit of an adapter on the Hub (default: main)")
    merge.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of all numbers (default: as the base has them)")
    merge.add_argument("--max-shard", type=_size, default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    merge.set_defaults(verb="merge")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except RecipeError as error:
        raise argparse.ArgumentTypeError(f"{error.problem} {error.fix}") from None
