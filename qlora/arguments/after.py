"""The verbs for what a run has left: chat, eval, merge, push."""

from __future__ import annotations

import argparse

from qlora.arguments.words import minutes, positive, size, temperature, whole

_CHAT_EXAMPLES = """\
examples:
  qlora chat runs/quickstart                  the adapter of a run, or of any folder
  qlora chat me/my-adapter@v2                 from the Hub, at a branch, tag or commit; its base is found from its own config
  qlora chat runs/a runs/b me/c               several on one base, which is loaded once; /use b switches in a moment
  qlora chat runs/a --temperature 0.7 --seed 1    varied answers, the same ones each time
  echo "Hello" | qlora chat me/my-adapter     one line is one turn, and only answers are printed

In the chat:
  /use [NAME]    let this adapter answer; alone, list them            /base     answer without the adapter, and with it again
  /both [TEXT]   base and adapter answer one line; /all: all do       /again    answer the last line anew
  /system TEXT   goes before the conversation; off: none              /reset    forget the conversation
  /temperature T, /seed N, /tokens N   as the options of these names  /memory   what it takes, and how much longer it may get
  /help lists the commands. /quit or Ctrl-D ends, Ctrl-C stops an answer.

The conversation is kept when another adapter answers, each in the chat template that it was trained with. Above temperature 0
words are drawn as the base's generation_config recommends (top_p, top_k and the like), and from all words where it says nothing.
What a model writes while it thinks (<think>...</think>) is shown as it is.
"""
_EVAL_DESCRIPTION = """\
Measure adapters beside their bare base, on the same rows: loss and perplexity by token and by byte, how many answers match, and
what is written. Every figure comes with its 95 % interval, and better or worse is said only where that of the difference leaves
out 0. How much goes through the model at once is planned for the memory that is free, as in training; a base that does not fit is
streamed.
"""
_EVAL_EXAMPLES = """\
examples:
  qlora eval runs/quickstart                          on the rows that the run held out
  qlora eval me/my-adapter --data rows.jsonl          on rows of your own
  qlora eval runs/a runs/b me/c --data rows.jsonl     several adapters of one base, which is loaded once
  qlora eval runs/quickstart --rows 100 --answers 0   the loss alone, of 100 rows
  qlora eval runs/quickstart --json > figures.json    for a script; --per-row adds the loss of each row

--json prints one object: "results" has a candidate each, the base first, with its figures, their "intervals" and, of an adapter,
"beside_base": the difference on the same rows and its outcome. Losses are in nats; bits_per_byte and byte_perplexity are by byte
of the answers' text in UTF-8, so that models with different tokens can be compared. "samples", "data" (files and their sha256),
"machine" (device, versions, what was planned) and "seconds" follow.
"""
_MERGE_DESCRIPTION = """\
Write an adapter and its base as one model, which loads without PEFT. It is written tensor by tensor, so that it takes little RAM,
and then held against base and adapter, and against what was trained. OUT is there whole or not at all.
"""
_MERGE_EXAMPLES = """\
--into 16bit   adds the adapter to the base's original weights (default), which are finer than the 4-bit ones of its training.
--into nf4     adds it to the weights as 4 bits left them in training, stored in 16 bits: what was trained, and no smaller.

examples:
  qlora merge runs/quickstart                       into the folder quickstart-merged
  qlora merge runs/quickstart --dry-run             what it takes of RAM and disk; nothing is written
  qlora merge me/my-adapter merged --dtype fp16     from the Hub; for cards without bf16
"""
_EXPORT_DESCRIPTION = """\
Write an adapter as a GGUF file for llama.cpp, Ollama and others: merged into its base, with tokenizer and chat template inside,
and a Modelfile for Ollama beside it; or alone. No compiler is needed. It is written tensor by tensor, so that it takes little
RAM, read back by Transformers, and held against merged model and adapter. OUT is there whole or not at all.
"""
_EXPORT_EXAMPLES = """\
formats: f32 f16 bf16 q8_0 (default) q5_1 q5_0 q4_1 q4_0; of an adapter alone f16 (default), f32, bf16. llama.cpp's own quantiser
writes q4_k_m and its kin from an f16 file.

examples:
  qlora export runs/quickstart                       quickstart-gguf/quickstart-Q8_0.gguf, merged
  qlora export runs/quickstart --gguf f16            half of f32, as good as the merged model
  qlora export runs/quickstart --adapter-only        the adapter, to be put on a GGUF file of its base
  qlora export me/my-adapter --gguf q4_0 --dry-run   what it takes of RAM and disk; nothing is written
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
        "chat", parents=[common], help="talk to an adapter, or to several, from a folder or from the Hub", epilog=_CHAT_EXAMPLES,
        description="Load adapters on their 4-bit base, which is loaded once, and talk to them. The first one answers at first.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_adapters(chat)
    chat.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="of an answer, at most (default: 512)")
    chat.add_argument("--temperature", type=temperature, default=0.0, metavar="T",
                      help="0 takes the most probable word each time (default); 0.7 varies")
    chat.add_argument("--seed", type=whole, metavar="N",
                      help="the same seed, adapter and conversation give the same answer (default: a new one for each answer)")
    chat.add_argument("--system", default="", metavar="TEXT",
                      help="goes before the conversation, where the chat template takes it")
    chat.set_defaults(verb="chat")


def add_eval(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    evaluate = verbs.add_parser(
        "eval", parents=[common], help="measure adapters beside their base", epilog=_EVAL_EXAMPLES, description=_EVAL_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_adapters(evaluate)
    evaluate.add_argument("--data", metavar="FILE", help="rows to measure on (default: those that the first run held out)")
    evaluate.add_argument("--rows", type=positive, metavar="N", help="at most so many rows")
    evaluate.add_argument("--answers", type=whole, metavar="N",
                          help="rows that are answered, for the matches; 0 = none (default: as many as in training, or 64)")
    evaluate.add_argument("--samples", type=whole, default=3, metavar="N",
                          help="answers that are shown (default: 3; in JSON: all)")
    evaluate.add_argument("--per-row", action="store_true", help="with --json: the loss of each row as well")
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
    merge.add_argument("--dry-run", action="store_true", help="show what it takes; write nothing")
    merge.set_defaults(verb="merge")


def add_export(verbs: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """A file for llama.cpp and Ollama."""
    export = verbs.add_parser(
        "export", parents=[common], help="write a GGUF file for llama.cpp and Ollama", description=_EXPORT_DESCRIPTION,
        epilog=_EXPORT_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("source", metavar="SOURCE",
                        help="a run folder, an adapter folder, or owner/name on the Hub, maybe with @revision")
    export.add_argument("out", metavar="OUT", nargs="?", help="a new folder (default: NAME-gguf, in this folder)")
    export.add_argument("--gguf", metavar="FORMAT", nargs="?", dest="form",
                        help="how numbers are stored: see below (default: q8_0)")
    export.add_argument("--adapter-only", action="store_true", help="the adapter without its base")
    export.add_argument("--into", choices=("16bit", "nf4"), default="16bit",
                        help="which weights of the base: the original ones (default), or as 4 bits left them in training")
    export.add_argument("--base", metavar="MODEL", help="the base, a Hub id or a folder (default: what the adapter names)")
    export.add_argument("--revision", metavar="R", help="branch, tag or commit of an adapter on the Hub (default: main)")
    export.add_argument("--dry-run", action="store_true", help="show what it takes; write nothing")
    export.set_defaults(verb="export")


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


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", metavar="SOURCE", nargs="+",
                        help="a run folder, an adapter folder, or owner/name on the Hub, maybe with @revision")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the adapter on the Hub (default: main)")
    parser.add_argument("--base", metavar="MODEL", help="the base: a Hub id or a folder (default: what the adapters name)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="where it runs (default: a GPU if there is one)")
