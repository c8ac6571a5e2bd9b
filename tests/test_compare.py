"""scripts/compare and its neighbours: figures from answers, turns, what breaks, and that nothing is made up."""

import importlib.machinery
import importlib.util
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from comparing.contenders import CONTENDERS, OURS, PLAIN, Contender
from comparing.running import Broken, open_process
from comparing.tables import CURVES_TOLERANCE, compare_rows, goals, plot, row_of, table
from comparing.work import Work

# Answers as comparing/worker.py answers: a first step by itself, then as told; the number of threads comes back as a loss.
TOY = """
import json, os, sys, time
def answer(**words): print(json.dumps(words), flush=True)
mode = sys.argv[1]
if mode == "dies":
    print("something is wrong", file=sys.stderr); sys.exit(3)
answer(event="imported", seconds=1.0)
if "--meter" in sys.argv:
    answer(event="memory", load=5, train=7); sys.exit()
answer(event="built", seconds=2.0)
if mode == "hangs": time.sleep(60)
step = {"seconds": 0.5, "ended": 3.0, "loss": float(os.environ["OMP_NUM_THREADS"])}
answer(event="block", steps=[step])
for line in sys.stdin:
    word, _, number = line.strip().partition(" ")
    if word == "stop" or mode == "breaks": break
    answer(event="block", steps=[step] * int(number))
if mode != "breaks": answer(event="end", peak_rss_bytes=9)
"""


@pytest.fixture(scope="module")
def compare(root):
    """The script, which has no ending that Python imports by itself."""
    loader = importlib.machinery.SourceFileLoader("compare_script", str(root / "scripts" / "compare"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("compare_script", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def work(tmp_path):
    return Work("toy", str(tmp_path), length=10, micro_batch=3)


def steps(*seconds, losses=(2.0, 1.0)):
    return [{"seconds": each, "loss": loss} for each, loss in zip(seconds, losses)]


def found(*blocks, **more):
    first = [{"seconds": 9.0, "loss": 4.0}]
    return {"imported": 1.0, "built": 2.0, "first_step": 3.0, "first": first, "blocks": list(blocks), **more}


def row(name, kind, work, *blocks, **more):
    return row_of(Contender(name, name, kind), work, found(*blocks, **more))


def toy(mode, work, timeout=30.0, **options):
    return open_process(Contender(mode, mode, OURS, environment={"TOY": "1"}), work, {"OMP_NUM_THREADS": "2"}, timeout,
                        worker=(sys.executable, "-c", TOY), **options)


# --- figures -----------------------------------------------------------------------------------------------------------


def test_speed_is_the_median_of_the_blocks_without_the_first_step(work):
    got = row("a", OURS, work, steps(1.0, 2.0), steps(1.0, 1.0), steps(5.0, 5.0))
    assert (got["slowest"], got["tokens_per_second"], got["fastest"]) == (6.0, 20.0, 30.0)
    assert got["losses"][0] == 4.0 and len(got["losses"]) == 7


def test_ratios_are_to_the_first_of_ours_that_ran(work):
    rows = compare_rows([
        row_of(Contender("gone", "gone", OURS), work, {"why_not": "failed: x"}),
        row("peer", PLAIN, work, steps(2.0, 2.0)), row("mine", OURS, work, steps(1.0, 1.0)),
        row("other", OURS, work, steps(4.0, 4.0)),
    ])
    assert [each.get("times_ours") for each in rows] == [None, 0.5, 1.0, 0.25]
    assert {each.get("reference") for each in rows[1:]} == {"mine"}


@pytest.mark.parametrize("factor, agrees", [(1.0, True), (1 + CURVES_TOLERANCE / 2, True), (1 + 2 * CURVES_TOLERANCE, False),
                                            (math.nan, False)])
def test_curves_that_differ_are_called_so(work, factor, agrees):
    mine, peer = row("mine", OURS, work, steps(1.0, 1.0)), row("peer", PLAIN, work, steps(1.0, 1.0, losses=(2.0, 1.0 * factor)))
    both = compare_rows([mine, peer])
    assert both[1]["curves"]["agree"] is agrees and both[1]["curves"]["num_steps"] == 3
    assert ("DIFFER" in table(both)) is not agrees


def test_curves_without_losses_are_not_known(work):
    both = compare_rows([row("mine", OURS, work, steps(1.0, 1.0)), row("peer", "axolotl", work, [{"seconds": 1.0}], first=[])])
    assert both[1]["curves"]["agree"] is None and "not known" in table(both)


def test_who_is_not_here_has_a_row_and_no_figures(work):
    gone = row_of(Contender("gone", "gone", "unsloth"), work, {"why_not": "not installed: unsloth"})
    rows = compare_rows([row("mine", OURS, work, steps(1.0, 1.0)), gone])
    line = next(line for line in table(rows).splitlines() if "gone" in line)
    assert "not installed: unsloth" in line and not any(character.isdigit() for character in line)
    assert not [value for value in rows[1].values() if isinstance(value, float)]


def test_every_line_of_the_table_has_as_many_cells(work):
    rows = compare_rows([row("mine", OURS, work, steps(1.0, 1.0), memory={"load": 1, "train": 2**30}, peak_rss_bytes=2**31),
                         row_of(Contender("gone", "gone", "unsloth"), work, {"why_not": "not installed"})])
    lines = table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "| 1.00 | 2.00 |" in lines[2]


def test_goals_hold_ours_against_the_fastest_plain_setting(work):
    slow = row("slow", PLAIN, work, steps(4.0, 4.0), memory={"train": 10})
    fast = row("fast", PLAIN, work, steps(2.0, 2.0), memory={"train": 40})
    mine = row("mine", OURS, work, steps(1.0, 1.0), memory={"train": 20}, built=0.5)
    lines = goals([mine, slow, fast])
    assert "2.00 times" in lines[0] and "(fast)" in lines[0] and "0.50 times its tensor memory" in lines[0]
    assert "4.0 times as long" in lines[-1] and "Of ours" not in lines[-1]
    assert goals([mine]) == [] == goals([slow])


def test_a_start_is_compared_with_and_without_imports(work):
    """Libraries take most of a quick start, and the same for all."""
    peer = row("peer", PLAIN, work, steps(1.0, 1.0), imported=4.0, built=14.0)
    mine = row("mine", OURS, work, steps(1.0, 1.0), imported=4.0, built=6.0, stages={"Loading the base": 1.0, "Waiting": 0.01})
    line = goals([mine, peer])[-1]
    assert "6.0 s; the plain stack after 14.0 s (2.3 times as long); without imports 2.0 s and 10.0 s (5.0 times as long)" in line
    assert line.endswith("Of ours: Loading the base 1.0.")


def test_the_plot_leaves_out_who_has_no_speed(work, tmp_path):
    gone = row_of(Contender("gone", "gone", PLAIN), work, {"why_not": "x"})
    rows = compare_rows([row("mine", OURS, work, steps(1.0, 1.0)), gone])
    plot({"model": rows, "another": rows}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


# --- who takes part ----------------------------------------------------------------------------------------------------


def test_programs_that_are_absent_say_what_is_missing():
    absent = Contender("x", "x", "unsloth", needs=("json", "no_such_module_at_all"), needs_gpu=True)
    assert absent.missing(on_gpu=True) == "not installed: no_such_module_at_all"
    here = Contender("x", "x", "unsloth", needs=("json",), needs_gpu=True)
    assert here.missing(on_gpu=False) == "needs a GPU" and here.missing(on_gpu=True) == ""


def test_contenders_have_names_of_their_own_and_ours_comes_first():
    assert len({each.name for each in CONTENDERS}) == len(CONTENDERS) >= 9
    assert CONTENDERS[0].is_ours and CONTENDERS[0].cold_start
    assert any(each.is_plain and not each.settings and not each.environment for each in CONTENDERS), "nobody has the defaults"
    assert all(each.tried is (each.is_ours or each.is_plain) for each in CONTENDERS)


def test_our_own_variants_take_part_where_they_are_named(compare):
    usual = [each.name for each in compare._chosen([])]
    assert "qlora" in usual and "plain-fast" in usual and "qlora-fused" not in usual
    assert [each.name for each in compare._chosen(["qlora-fused"])] == ["qlora-fused"]


def test_the_readme_shows_what_was_measured(compare, root):
    """`scripts/compare --table scripts/evidence/compare-cpu.json --write` mends the tables."""
    document = json.loads((root / "scripts" / "evidence" / "compare-cpu.json").read_text(encoding="utf-8"))
    assert compare._PLACE.text() == compare._text(document)
    assert compare._SHORT.text() == compare._short_text(document)
    rows = [row for found in document["models"].values() for row in found["rows"] if "why_not" not in row]
    assert len(rows) >= 10 and all(row["curves"]["agree"] for row in rows)


def test_tables_are_written_between_their_markers(compare, tmp_path, monkeypatch):
    row = {"name": "a", "tried_here": True, "why_not": "not installed", "kind": "unsloth"}
    document = {"device": "d", "threads": 2, "date": "2026-01-02T03", "command": "scripts/compare", "models": {
        "m": {"work": {"rank": 16, "micro_batch": 2, "length": 8}, "load": 0.1, "rows": [row], "goals": []}}}
    (tmp_path / "found.json").write_text(json.dumps(document))
    readme, short = tmp_path / "comparing.md", tmp_path / "README.md"
    monkeypatch.setattr(compare, "_PLACE", replace(compare._PLACE, page=readme))
    monkeypatch.setattr(compare, "_SHORT", replace(compare._SHORT, page=short))
    short.write_text(marks := "before\n<!-- compare: written by scripts/compare --write -->\nold\n<!-- end of compare -->\nafter\n")
    readme.write_text(marks)
    assert compare.main(["--table", str(tmp_path / "found.json"), "--write"]) == 0
    assert "| a | not installed |" in readme.read_text() and "old" not in readme.read_text()
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("after\n")
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks <!-- compare"):
        compare.main(["--table", str(tmp_path / "found.json"), "--write"])


@pytest.mark.parametrize("words, says", [
    (["--only", "nobody"], "There is no contender 'nobody'"), (["--table", "absent.json"], "absent.json cannot be read"),
    (["--out", "absent/x.json"], "There is no folder"),
])
def test_mistakes_are_told_in_a_line(compare, words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.main(words) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told


@pytest.mark.parametrize("words", [["--blocks", "0"], ["--minutes", "nan"], ["--steps", "-1"], ["--threads", "two"]])
def test_numbers_that_make_no_sense_are_refused(compare, words):
    with pytest.raises(SystemExit) as stopped:
        compare.main(words)
    assert stopped.value.code == 2


def test_the_list_names_everybody(compare, capsys):
    assert compare.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(each.name in said for each in CONTENDERS)


# --- turns -------------------------------------------------------------------------------------------------------------


def test_a_process_trains_as_far_as_it_is_told(work):
    process = toy("good", work)
    process.start()
    process.train(2)
    process.train(1)
    process.end()
    assert [len(block) for block in process.found["blocks"]] == [2, 1]
    assert (process.found["imported"], process.found["built"], process.found["first_step"]) == (1.0, 2.0, 3.0)
    assert process.found["first"][0]["loss"] == 2.0, "the environment did not arrive"
    assert process.found["peak_rss_bytes"] == 9 and process.child.returncode is not None


def test_a_process_that_measures_tensors_answers_once(work):
    process = toy("good", work, meter=True)
    process.memory()
    assert process.found["memory"] == {"load": 5, "train": 7}


def test_a_process_that_dies_says_what_it_printed(work):
    process = toy("dies", work)
    with pytest.raises(Broken, match="ended with 3: something is wrong"):
        process.start()
    process.kill()


def test_a_process_that_says_nothing_is_given_up(work):
    process, began = toy("hangs", work, timeout=1.0), time.monotonic()
    with pytest.raises(Broken, match="no answer within 1 s"):
        process.start()
    process.kill()
    assert time.monotonic() - began < 20 and process.child.returncode is not None


def test_one_that_breaks_does_not_stop_the_others(work, compare):
    from qlora.progress import Progress

    processes = [toy("good", work), toy("breaks", work)]
    for process in processes:
        process.start()
    got = {process.contender.name: process.found for process in processes}
    options = compare._parser().parse_args(["--blocks", "3", "--steps", "2"])
    compare._take_turns(processes, options, time.monotonic() + 60, got, Progress())
    assert [len(block) for block in got["good"]["blocks"]] == [2, 2, 2] and got["good"]["peak_rss_bytes"] == 9
    assert got["breaks"]["why_not"].startswith("failed: ended with 0")
    for process in processes:
        process.kill()


def test_no_further_round_begins_when_the_time_is_up(work, compare):
    from qlora.progress import Progress

    process = toy("good", work)
    process.start()
    compare._take_turns([process], compare._parser().parse_args(["--blocks", "9"]), 0.0, {"good": process.found}, Progress())
    assert len(process.found["blocks"]) == 1, "a round is always made"
    process.kill()


# --- the neighbours ----------------------------------------------------------------------------------------------------


def test_work_of_a_step_counts_once(root):
    sys.path.insert(0, str(root / "scripts"))
    from profile_step import kind_of

    vocabulary = 1000
    cases = {
        ("aten::mm", ((512, 576), (576, 1536))): "wide products (base)",
        ("aten::mm", ((512, 576), (576, 16))): "narrow products (adapters)",
        ("aten::mm", ((512, 576), (576, 1000))): "products with the head",
        ("aten::exp_", ((200, 1000),)): "logits, number by number",
        ("aten::exp_", ((200, 576),)): "number by number (norms, activations, sums)",
        ("bitsandbytes::dequantize_4bit", ()): "dequantising",
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ()): "attention", ("aten::_fused_adamw_", ()): "optimizer",
        ("aten::copy_", ()): "copies and conversions", ("MmBackward0", ()): "Python and autograd",
    }
    assert {case: kind_of(*case, vocabulary) for case in cases} == cases


def test_import_times_are_read(root):
    from bench_startup import slowest_imports

    text = ("import time: self [us] | cumulative | imported package\nimport time:       100 |       2500 |   a.b\n"
            "import time: 7 | 9 | c\nother")
    assert slowest_imports(text) == [("a.b", 2.5), ("c", 0.009)]


@pytest.mark.long
def test_a_real_comparison_of_a_small_model(root, tmp_path):
    """Ours and the plain stack, really trained: the same losses, and every figure is there."""
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=512, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "small")
    out = tmp_path / "compared.json"
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "compare"), "--model", str(tmp_path / "small"), "--only", "qlora", "qlora-fused",
         "plain", "plain-logits", "unsloth", "--blocks", "2", "--steps", "3", "--length", "32", "--out", str(out),
         "--plot", str(tmp_path / "bars.png")], capture_output=True, text=True, timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rows = {each["name"]: each for each in next(iter(json.loads(out.read_text())["models"].values()))["rows"]}
    for name in ("qlora", "qlora-fused", "plain", "plain-logits"):
        figures = rows[name]
        assert "why_not" not in figures, figures["why_not"]
        assert figures["curves"]["agree"] and figures["curves"]["num_steps"] == 7 and len(set(figures["losses"])) > 3
        assert 0 < figures["import_seconds"] < figures["start_seconds"] < figures["first_step_seconds"]
        assert figures["tokens_per_second"] > 0 and figures["train_tensor_bytes"] > 0 and figures["peak_rss_bytes"] > 0
    assert rows["qlora"]["cold_first_step_seconds"] > 0 and "why_not" in rows["unsloth"]
    assert (tmp_path / "bars.png").is_file() and "not installed" in done.stdout
