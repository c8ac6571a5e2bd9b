"""The verbs for what a run has left: chat, eval, merge, push."""

from __future__ import annotations

import argparse

from qlora.arguments.words import minutes, positive, size, temperature

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


def add_chat(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    chat = verbs.add_parser(
        "chat", parents=[common], help="talk to an adapter, from a folder or from the Hub", epilog=_CHAT_EXAMPLES,
        description="Load an adapter on its 4-bit base and talk to it.", formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_adapter(chat)
    chat.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="of an answer, at most (default: 512)")
    chat.add_argument("--temperature", type=temperature, default=0.0, metavar="T",
                      help="0 takes the most probable word each time (default); 0.7 varies")
    chat.set_defaults(verb="chat")


def add_eval(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    evaluate = verbs.add_parser(
        "eval", parents=[common], help="measure an adapter beside its base", epilog=_EVAL_EXAMPLES,
        description="Loss, perplexity and exact match of an adapter and of its bare base, on the same rows.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_adapter(evaluate)
    evaluate.add_argument("--data", metavar="FILE", help="rows to measure on; of a run folder, those that it held out (default)")
    evaluate.add_argument("--rows", type=positive, metavar="N", help="at most so many rows")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(verb="eval")


def add_merge(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
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
    merge.add_argument("--max-shard", type=size, default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    merge.set_defaults(verb="merge")


def add_push(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Send a run to the Hub."""
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
    push.add_argument("--max-minutes", type=minutes, metavar="N", help="give up after so long (default: 60)")
    push.set_defaults(verb="push")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE",
                        help="a run folder, an adapter folder, or owner/name on the Hub, maybe with @revision")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of an adapter on the Hub (default: main)")
    parser.add_argument("--base", metavar="MODEL", help="the base: a Hub id or a folder (default: what the adapter names)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where it runs (default: a GPU if there is one)")
