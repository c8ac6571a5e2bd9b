"""Reports, plots and closing tables: nothing is invented, nothing breaks them, nothing private is in them."""

import copy
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.data import Finding, LengthStats
from qlora.evaluation import Evaluation
from qlora.hardware import Device
from qlora.planning.plan import Decision
from qlora.results.facts import DataFacts, ModelFacts, RunSummary, Sample, TrainingFacts, outcome, verdict
from qlora.results.plots import draw_all, percentile, smooth
from qlora.results.report import escape, load_report, render_markdown, reproduce_command, write_report
from qlora.results.summary import summary_tables

HOSTILE = [
    "a | b || c", "`x` and ```\nfenced\n```", "<script>alert(1)</script> <b>bold</b>", "**b** _i_ ~~s~~ # h",
    "[link](http://x) ![image](y) <http://z>", "\\| \\\\| \\", "one\ntwo\r\nthree\rfour", "    indented\n\tby a tab",
    "&lt; &amp; &#124;", "$x^2$ @someone", "| --- | --- |\n| 1 | 2 |", "[red]markup[/red] :smile:",
    "한국어 | 답", "넓은\u3000칸 👩\u200d💻",
]


def make_summary(**changes):
    summary = RunSummary(
        name="sample", folder="runs/sample", command="qlora train recipe.yaml lora.r=32",
        finished_at="2030-01-02T03:04:05+00:00",
        before=Evaluation(4.125, 1201, 0.125, 16), after=Evaluation(2.25, 1202, 0.75, 17),
        samples=tuple(Sample(text, text[::-1], "", text) for text in HOSTILE[:3]),
        model=ModelFacts(
            base="Qwen/Qwen3-0.6B", revision="abc123", model_type="qwen3", num_layers=28, hidden_size=1024,
            vocab_size=151936, num_parameters=596049920, quantised_parameters=440401920, num_4bit_modules=196,
            num_adapted_modules=197, trainable_parameters=10092544,
        ),
        data=DataFacts(
            files=("data/rows.jsonl",), sha256="5f" * 32, format="messages", num_rows=400, num_train=350,
            num_validation=41, max_length=512,
            lengths=LengthStats(p50=61, p95=122, p99=183, max=204, mean=66.5, histogram=[(0, 64, 3)]),
            num_truncated=5, num_answer_lost=6, num_fully_masked=7, num_duplicates=8, num_bad_rows=9,
            findings=(Finding("warning", "few-rows", "Only 400 rows.", "Add some."),),
        ),
        training=TrainingFacts(num_steps=22, epochs=3.0, tokens=12345, trained_tokens=4567, tokens_per_second=950.5),
        peak_bytes=3 * 2**30, budget_bytes=4 * 2**30, seconds={"load": 3.4, "train": 65.2},
        settings={"model.dtype": Decision("bf16", "rule", "it has the range"), "lora.r": Decision(16, "given", "given"),
                  "train.learning_rate": Decision(2e-4, "rule", "r | alpha"),
                  "lora.targets": Decision(["q", "v"], "given", "")},
        device=Device("cuda", "Card X", 8 * 2**30, 7 * 2**30, 32 * 2**30, 20 * 2**30, 12, True, (8, 6)),
        versions={"torch": "2.13.0"}, notes=("A note | with a pipe.",),
    )
    return replace(summary, **changes)


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_round_trips_through_json(tmp_path):
    summary = make_summary(after=Evaluation(math.inf, 1202, None, 0))
    write_report(summary, tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert document["after"]["perplexity"] == "Infinity"
    assert document["before"]["perplexity"] == pytest.approx(math.exp(4.125))
    assert load_report(tmp_path) == summary


def numbers(document, path=()):
    """Places of all numbers in a JSON document."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if isinstance(value, (int, float)):
            yield (*path, key)
        elif isinstance(value, (dict, list)):
            yield from numbers(value, (*path, key))


def test_every_number_of_the_summary_is_in_the_report():
    """Change any one, and the text changes."""
    document = make_summary().to_json()
    text = render_markdown(RunSummary.from_json(document))
    places = [place for place in numbers(document) if place[-1] != "perplexity" and "histogram" not in place]
    assert len(places) > 40
    for place in places:
        changed = copy.deepcopy(document)
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        old = holder[place[-1]]
        holder[place[-1]] = (not old) if isinstance(old, bool) else 0.5 if place[-1] == "exact_match" else old * 2 + 1
        assert render_markdown(RunSummary.from_json(changed)) != text, place


def cells(markdown):
    """Text of every table cell, row by row, as a Markdown renderer shows it."""
    from markdown_it import MarkdownIt

    tables = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables:
            shown = []
            for child in token.children:
                assert child.type in ("text", "text_special", "html_inline", "em_open", "em_close"), child
                assert child.type != "html_inline" or child.content == "<br>", child
                shown.append("\n" if child.type == "html_inline" else child.content)
            tables[-1][-1].append("".join(shown))
    return tables


@pytest.mark.parametrize("text", HOSTILE)
def test_any_sample_shows_as_it_is(text):
    summary = make_summary(samples=(Sample(text, text, "", text),))
    section = render_markdown(summary).split("## Answers to held-out prompts")[1].split("## What it took")[0]
    (table,) = cells(section)
    assert [len(row) for row in table] == [2] * 5
    wanted = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    shown = {name: value.replace("\u00a0", " ") for name, value in table[1:]}
    assert shown == {"prompt": wanted, "in the data": wanted, "before": "(empty)", "after": wanted}


def test_control_characters_do_not_reach_the_report():
    assert escape("a\x1b[31mb\x00\u202e") == "a\ufffd\\[31mb\ufffd\ufffd"


def test_home_is_not_named(tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    rows = home / "project" / "data" / "rows.jsonl"
    finding = Finding("warning", "x", f"{rows}:3 is long.", "")
    base = make_summary()
    summary = replace(
        base, data=replace(base.data, files=(str(rows),), findings=(finding,)), notes=(f"See {rows}.",),
        settings={"data.path": Decision(str(rows), "given", f"from {rows}")}, folder=str(home / "project/runs/a"),
        adapter=str(home / "project/runs/a/adapter"),
    )
    inside, outside = home / "project/runs/a", tmp_path / "scratch/a"
    for folder, wanted in ((inside, "../../data/rows.jsonl"), (outside, "~/project/data/rows.jsonl")):
        folder.mkdir(parents=True)
        write_report(summary, folder)
        for name in ("report.md", "report.json"):
            assert "alice" not in (folder / name).read_text(encoding="utf-8")
        assert load_report(folder).data.files == (wanted,)
    assert load_report(inside).adapter == "adapter"


def test_verdict_says_what_happened():
    summary = make_summary()
    assert verdict(summary).startswith("The model got better: on 41 rows")
    assert "13 of 17 answers match word for word (2 before)" in verdict(summary)
    worse = replace(summary, after=replace(summary.after, loss=4.5))
    assert (outcome(worse), verdict(worse)[:19]) == ("worse", "The model got worse")
    assert outcome(replace(summary, after=replace(summary.after, loss=4.13))) == "same"
    broken = replace(summary, after=replace(summary.after, loss=math.nan))
    assert outcome(broken) == "broken" and "Do not use" in verdict(broken)
    unknown = replace(summary, before=None, after=None)
    assert outcome(unknown) == "unknown" and "no held-out rows" in verdict(unknown)
    few = replace(summary, data=replace(summary.data, num_validation=8))
    assert "rough" in verdict(few) and "rough" not in verdict(summary)
    for case in (worse, broken, unknown):
        assert verdict(case).split(":")[0] in render_markdown(case).replace("\\", "")


def test_commands_and_code_survive_quoting():
    command = reproduce_command("my recipe.yaml", ["lora.targets=[q_proj, v_proj]", "output.dir=a```b"])
    text = render_markdown(make_summary(command=command))
    assert "````sh\nqlora train 'my recipe.yaml' 'lora.targets=[q_proj, v_proj]' 'output.dir=a```b'\n````" in text
    code = text.split("```python\n")[1].split("\n```")[0]
    compile(code, "report", "exec")
    assert '"Qwen/Qwen3-0.6B", revision="abc123"' in code


# --- on a terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_closing_tables_fit_and_tell_all(width):
    from rich.console import Console

    long = "word " * 400
    summary = make_summary(samples=(
        Sample(long, "[red]not markup[/red]", "\x1b[2Jcleared", ""), Sample("한국어 " * 90, "b", "c", "d"),
    ))
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for part in summary_tables(summary):
        console.print(part)
    text = stream.getvalue()
    from rich.cells import cell_len

    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert text.count("…") == 2 and "\x1b" not in text and "[red]not markup[/red]" in text and "(empty)" in text
    for wanted in ("4.125", "2.250", "61.87", "9.49", "12.5 %", "75.0 %", "lower is better", "higher is better",
                   "3.00 GiB", "10,092,544", "1.69 %", "1 min 09 s"):
        assert wanted in text, wanted


def test_closing_tables_without_held_out_rows():
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=80, color_system=None)
    for part in summary_tables(make_summary(before=None, after=None, samples=())):
        console.print(part)
    assert "no held-out rows" in stream.getvalue() and "perplexity" not in stream.getvalue()


# --- plots ------------------------------------------------------------------------------------------------------------


def metrics(num_steps, lost=()):
    for step in range(1, num_steps + 1):
        value = math.nan if step in lost else 2.0 / step
        yield {"step": step, "loss": value, "grad_norm": value, "learning_rate": 1e-4 / step}
    yield {"step": num_steps, "eval_loss": 1.5, "eval_perplexity": math.exp(1.5)}


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.filterwarnings("error:.*matplotlib", "error:.*[Gg]lyph", "error::RuntimeWarning")
@pytest.mark.parametrize("num_steps, lost", [(1, ()), (1, (1,)), (7, (2, 3)), (300, (150,))])
def test_plots_are_pictures(tmp_path, num_steps, lost):
    modules = set(sys.modules)
    written = draw_all(list(metrics(num_steps, lost)), [(0, 9, 3), (10, 19, 0), (20, 29, 1)], 25, tmp_path / "plots",
                       max_grad_norm=1.0)
    assert "matplotlib.pyplot" not in set(sys.modules) - modules
    assert [path.name for path in written] == ["loss.png", "learning_rate.png", "grad_norm.png", "lengths.png"]
    for path in written:
        image = pixels(path)
        assert image.shape[:2] == (675, 1200)
        assert image[..., :3].std() > 0.02, path


def test_values_that_are_not_finite_are_marked(tmp_path):
    """A step without a number looks different from a step that is not there."""
    rows = list(metrics(60, lost=(30,)))
    kept = [row for row in rows if row["step"] != 30]
    marked, unmarked = (draw_all(r, [], 1, tmp_path / name)[0] for name, r in (("a", rows), ("b", kept)))
    assert (pixels(marked) != pixels(unmarked)).any()


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert draw_all([], [], 128, tmp_path / "plots") == []


def test_report_links_only_plots_that_are_there(tmp_path):
    draw_all([{"step": 1, "loss": 1.0}], [], 128, tmp_path / "plots")
    text = write_report(make_summary(), tmp_path).read_text(encoding="utf-8")
    assert "(plots/loss.png)" in text and "grad_norm.png" not in text


def test_smoothing_keeps_lines_and_drops_spikes():
    values = [3.0] * 1000
    assert smooth(values)[0] == pytest.approx(values)
    line = [float(i) for i in range(1000)]
    medians, window = smooth(line)
    assert window % 2 == 1 and medians[window:-window] == line[window:-window]
    line[500] = 1e9
    assert max(smooth(line)[0]) < 1000
    assert smooth([5.0, 1.0]) == ([5.0, 1.0], 1)
    assert percentile([(0, 9, 1), (10, 19, 1)], 0.5) == 9
