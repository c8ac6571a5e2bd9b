#!/usr/bin/env python3
"""Does llama.cpp itself compute from our GGUF files what the merged model computes? Prints a Markdown table.

    .venv/bin/python scripts/prove_gguf.py runs/quickstart            an adapter of yours, and an untrained one of each family
    .venv/bin/python scripts/prove_gguf.py --python other/bin/python  where llama_cpp is installed for another Python
    .venv/bin/python scripts/prove_gguf.py runs/quickstart --thresholds      no llama.cpp: the KL of every format, by Transformers

Needs llama-cpp-python, which is no part of this project: `pip install llama-cpp-python` (it compiles llama.cpp; minutes).

Of each adapter: the merged model in Transformers (fp32) beside llama.cpp reading the f32, f16 and q8_0 export. The same token ids
for 20 texts; KL(merged || llama.cpp) after every token of 20 prompts; the same greedy answer of 24 tokens. Then the adapter
alone, put by llama.cpp on its base in GGUF, beside base + adapter by PEFT.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

_SHOWN = ("f32", "f16", "q8_0")
_NUM_ANSWER = 24
PROMPTS = (
    "Write one sentence about the sea.", "What is 17 plus 25? Answer with the number alone.",
    "Translate into French: the red house", "List three animals that can fly.", "def fibonacci(n):",
    "Name the capital of Italy.", "Once upon a time there was a little girl", "Explain in two sentences why the sky is blue.",
    "The parcel with the clock is late. Call me at once.", "I'm glad it's over; we'll see.",
    "The new blanket does not work. Please hurry.", "One day, Tom and Sue went to the park", "How many legs has a spider?",
    "Say hello", "The cat sat on the mat", "Grüße aus Köln, naïve façade", "日本語のテキスト", "3.14 and 2024-05-01, $1,234.50",
    "a  b   c    d", "emoji 🙂 here",
)
# Runs where llama_cpp is, which may have none of our libraries: tokens, logits and a greedy answer for each prompt.
_WORKER = """
import json, sys
import numpy as np
import llama_cpp
order = json.load(open(sys.argv[1]))
model = llama_cpp.Llama(order["model"], n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
                        lora_path=order["lora"], type_k=0, type_v=0)  # a cache in F32: it is the file that is looked at
tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in order["texts"]]
logits, answers = {}, []
for number, ids in enumerate(order["ids"]):
    model.reset()
    model.eval(ids)
    logits[str(number)] = np.array(model.scores[: len(ids)], dtype=np.float32)
    answer = []
    for _ in range(order["num_answer"]):
        answer.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(answer[-1:])
    answers.append(answer)
np.savez(order["logits"], **logits)
json.dump({"tokens": tokens, "answers": answers, "version": llama_cpp.__version__}, open(order["out"], "w"))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="run or adapter folders")
    parser.add_argument("--python", default=sys.executable, help="a Python that has llama_cpp (default: this one)")
    parser.add_argument("--thresholds", action="store_true", help="the KL of every format, without llama.cpp")
    parser.add_argument("--only-sources", action="store_true", help="no untrained models")
    options = parser.parse_args()
    if not options.thresholds and subprocess.run([options.python, "-c", "import llama_cpp"], capture_output=True).returncode:
        print(f"error: {options.python} has no llama_cpp.\nInstall it there: {options.python} -m pip install llama-cpp-python",
              file=sys.stderr)
        return 2
    from qlora import _compat

    _compat.prepare_environment()
    _compat.quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        cases = list_cases(options, Path(folder))
        (print_thresholds if options.thresholds else print_proof)(cases, Path(folder), options.python)
    return 0


def list_cases(options: argparse.Namespace, folder: Path) -> list[tuple[str, str]]:
    """Names and adapter folders."""
    import tiny_families

    cases = [(Path(source).name, source) for source in options.sources]
    stories = ROOT.parent / "shared" / "models" / "stories260K"
    if options.only_sources:
        return cases
    if stories.is_dir():
        cases.append(("stories260K", str(tiny_families.save_adapter(stories, folder / "stories"))))
    for name in tiny_families.FAMILIES:
        base = tiny_families.save_family(name, folder / name / "base")
        cases.append((f"{name}, untrained", str(tiny_families.save_adapter(base, folder / name / "adapter"))))
    return cases


def print_thresholds(cases: list[tuple[str, str]], folder: Path, python: str) -> None:
    from qlora.exporting import FORMATS, export
    from qlora.hub.fetch import find_adapter

    print(f"Mean KL(merged || exported), nats a token; {about()}\n")
    print("| adapter | what it does itself | " + " | ".join(FORMATS) + " |")
    print("| --- " * (len(FORMATS) + 2) + "|")
    for number, (name, source) in enumerate(cases):
        figures, itself = [], 0.0
        for form in FORMATS:
            try:
                found = export(find_adapter(source), folder / f"t{number}-{form}", form=form).model
                figures.append(f"{found.exported.kl:.1e}")
                itself = found.kl_of_adapter
            except Exception as error:  # a case that fails is a cell of the table
                figures.append(f"**{str(error).splitlines()[0][:160]}**")
        print(f"| {name} | {itself:.2g} | " + " | ".join(figures) + " |", flush=True)


def print_proof(cases: list[tuple[str, str]], folder: Path, python: str) -> None:
    print("| adapter | file | same tokens | KL mean | KL largest | same greedy text |\n| --- | --- | --- | --- | --- | --- |")
    version = ""
    for number, (name, source) in enumerate(cases):
        for row, version in prove(source, folder / f"p{number}", python):
            print(f"| {name} | {row} |", flush=True)
    print(f"\nllama-cpp-python {version}, {about()}")


def prove(source: str, folder: Path, python: str) -> Any:
    """Rows of the table, and llama.cpp's version."""
    from qlora.adapted import find_tokenizer
    from qlora.exporting import export
    from qlora.exporting.texts import in_form
    from qlora.hub.fetch import find_adapter
    from qlora.merging import merge
    from qlora.merging.parts import gather
    from qlora.progress import Progress

    folder.mkdir()
    adapter, progress = find_adapter(source), Progress()
    tokenizer = find_tokenizer(adapter, progress)
    texts = [in_form(tokenizer, prompt) for prompt in PROMPTS]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][-200:] for text in texts]
    merged = load(merge(adapter, folder / "merged").folder)
    wanted = answers_of(merged, ids)
    for form in _SHOWN:
        found = export(adapter, folder / form, form=form)
        yield compare(found.path, None, texts, ids, wanted, folder, python, f"{form}, merged")
    # The base alone as GGUF: an adapter of zeros, merged.
    base = export(find_adapter(str(zeroed(adapter.folder, folder / "zero")), base=adapter.base), folder / "base", form="f32").path
    alone = export(adapter, folder / "alone", adapter_only=True).path
    from peft import PeftModel

    parts = gather(adapter, into="16bit", dtype=None, progress=progress)
    adapted = PeftModel.from_pretrained(load(parts.folder), str(adapter.folder)).eval()
    yield compare(base, alone, texts, ids, answers_of(adapted, ids), folder, python, "f16, adapter alone on its f32 base")


def compare(
    model: Path, lora: Path | None, texts: list[str], ids: list[list[int]], wanted: Any, folder: Path, python: str, what: str
) -> tuple[str, str]:
    import numpy as np
    import torch

    from qlora.merging.checking import agree

    order = {"model": str(model), "lora": lora and str(lora), "texts": texts, "ids": ids, "num_answer": _NUM_ANSWER,
             "logits": str(folder / "logits.npz"), "out": str(folder / "out.json")}
    (folder / "order.json").write_text(json.dumps(order))
    done = subprocess.run([python, "-c", _WORKER, str(folder / "order.json")], capture_output=True, text=True)
    if done.returncode:
        return f"{what} | **{(done.stderr.strip().splitlines() or ['?'])[-1][:200]}** | | |", ""
    out, logits = json.loads((folder / "out.json").read_text()), np.load(folder / "logits.npz")
    size = wanted[0][0].shape[-1]
    found = [agree(expected[None], torch.from_numpy(logits[str(number)])[None, :, :size])
             for number, (expected, _) in enumerate(wanted)]
    same_tokens = sum(one == other for one, other in zip(out["tokens"], ids, strict=True))
    same = sum(one == expected for one, (_, expected) in zip(out["answers"], wanted, strict=True))
    kl = sum(each.kl * len(one) for each, one in zip(found, ids, strict=True)) / sum(map(len, ids))
    return (f"{what} | {same_tokens} of {len(ids)} | {kl:.1e} | {max(each.max_kl for each in found):.1e} | {same} of {len(ids)}",
            out["version"])


def answers_of(model: Any, ids: list[list[int]]) -> list[tuple[Any, list[int]]]:
    """Logits after each token of a prompt, and the greedy answer, which no token ends."""
    import torch

    found = []
    for row in ids:
        answer: list[int] = []
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row]), use_cache=True)
            logits, cache = out.logits[0].float(), out.past_key_values
            last = logits[-1]
            for _ in range(_NUM_ANSWER):
                answer.append(int(last.argmax()))
                out = model(input_ids=torch.tensor([answer[-1:]]), past_key_values=cache, use_cache=True)
                last, cache = out.logits[0, -1].float(), out.past_key_values
        found.append((logits, answer))
    return found


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def zeroed(adapter: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def about() -> str:
    from importlib.metadata import version

    names = ("gguf", "transformers", "peft", "torch")
    return ", ".join(f"{name} {version(name)}" for name in names) + f"; {datetime.now(timezone.utc):%Y-%m-%d}"


if __name__ == "__main__":
    sys.exit(main())
