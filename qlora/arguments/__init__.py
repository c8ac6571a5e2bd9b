"""What may be written after `qlora`: the verbs, their options and their help. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from qlora import __version__
from qlora.arguments import after, before, evidence, sweep

_DESCRIPTION = """\
Fine-tune a large language model on one small GPU: a frozen 4-bit base, trainable 16-bit LoRA adapters.

  qlora train recipes/quickstart.yaml            a first run, on a GPU or a CPU, without network
  qlora plan --model Qwen/Qwen3-8B --vram 8GB    what can be trained on this card, and with what settings?
  qlora check recipes/chat.yaml                  is the data right? no weights needed
  qlora inspect Qwen/Qwen3-0.6B --r 16           what would be adapted, and how large is it?
  qlora sweep recipes/chat.yaml                  which rank, alpha and targets? measured on your rows
  qlora push runs/chat me/my-adapter             share a finished run: adapter, model card, report
  qlora export runs/chat                         a GGUF file for llama.cpp and Ollama
  qlora chat me/my-adapter                       talk to an adapter, of a run or from the Hub; eval and merge take the same
"""
# In the order in which people meet them.
_VERBS = (
    before.add_train, before.add_check, before.add_plan, before.add_models, before.add_inspect, before.add_cache, sweep.add_sweep,
    after.add_chat, after.add_eval, after.add_merge, after.add_export, after.add_push,
    evidence.add_measure,
)


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
    for add in _VERBS:
        add(verbs, common)
    return parser


def join_sizes(words: Sequence[str]) -> list[str]:
    """`--vram -3GB` as one word: argparse would take the size for an option, and our message says more than its own."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--vram", "--compare") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
