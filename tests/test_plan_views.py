"""Plans as people see them: text on 80 columns without colours, pictures, and the report's comparison."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_results import make_summary

from qlora.errors import OutputError
from qlora.planning.plan import PARTS, PHASES, Alternative, Decision, Plan
from qlora.recipe import build_recipe, load_recipe
from qlora.results.facts import memory_by_phase
from qlora.results.frozen import frozen_recipe, write_frozen
from qlora.results.plan_plots import PART_COLORS, check_picture, draw_compare, draw_plan, draw_planned_measured
from qlora.results.report import load_report, write_report
from qlora.units import GIB, MIB, format_bytes
from qlora.views import compare_view, models_view, plan_view
from qlora.views.memory_bar import LETTERS, MemoryBar, scaled

SIZES_MIB = {
    "base": 3635, "embeddings": 1024, "head": 0, "adapters": 160, "gradients": 161, "optimizer": 320, "activations": 600,
    "loss": 180, "workspace": 90, "context": 300, "margin": 200,
}


def make_plan(**changes):
    """A plan of 6,670 MiB on a card of 8 GiB."""
    decisions = {
        "model.base": Decision("Qwen/Qwen3-8B", "given", "given"), "data.path": Decision("rows.jsonl", "given", "given"),
        "model.dtype": Decision("bf16", "rule", "the card computes bf16, which has the range of fp32"),
        "data.format": Decision("messages", "derived", "the rows have a column messages"),
        "data.validation": Decision("60 rows", "rule", "5 % of the rows"),
        "data.max_length": Decision(2048, "derived", "the longest of 1,200 rows has 2,011 tokens"),
        "lora.r": Decision(32, "rule", "1,200 rows and 8.19B parameters"), "lora.alpha": Decision(32.0, "rule", "alpha = r"),
        "lora.targets": Decision(["q_proj", "v_proj"], "given", "given"),
        "train.batch": Decision(16, "rule", "16 rows steady the gradient"),
        "train.micro_batch": Decision(2, "derived", "more than 2 rows do not fit"),
        "train.accumulation": Decision(8, "derived", "batch / micro_batch"),
        "train.learning_rate": Decision(2e-5, "rule", "within the band"), "train.epochs": Decision(1.0, "default", "default: passes"),
        "train.optimizer": Decision("paged_adamw_8bit", "rule", "its state can leave the card"),
        "train.eval_every": Decision(0, "derived", "there is no data yet"),
        "memory.checkpointing": Decision(True, "rule", "without it\nthe rows do not fit"),
        "memory.budget": Decision("8.00GiB", "derived", "all of the card"),
        "memory.streamed_layers": Decision(4, "derived", "the others take turns in two slots"),
    }
    values = dict(
        model="Qwen/Qwen3-8B", device="NVIDIA GeForce RTX 4060", kind="cuda", budget_bytes=8 * GIB, fits=True,
        phases=dict(zip(PHASES, (5012 * MIB, 6170 * MIB, 5222 * MIB, 5068 * MIB, 5013 * MIB, 5427 * MIB))),
        parts={part: size * MIB for part, size in SIZES_MIB.items()}, reserved_bytes=6543 * MIB, host_peak_bytes=3277 * MIB,
        disk_bytes=701 * MIB, decisions=decisions, num_steps=72, tokens_per_second=1234.5,
        speed_basis="38 % of the card's 60 TFLOP/s", longest_length=3072, notes=("The experts stay in 16 bits.",), seconds=3.4,
    )
    return Plan(**{**values, **changes})


def too_big(**changes):
    """The same on a card of 4 GiB, with three nearest fits."""
    found = (
        Alternative("rows of up to 512 tokens", ("data.max_length=512",), "Qwen/Qwen3-8B", "a card of 4 GB", 4000 * MIB, 4 * GIB),
        Alternative("Qwen/Qwen3-1.7B", ("model.base=Qwen/Qwen3-1.7B",), "Qwen/Qwen3-1.7B", "a card of 4 GB", 3000 * MIB, 4 * GIB),
        Alternative("a card of 8 GB", ("--vram 8GB",), "Qwen/Qwen3-8B", "a card of 8 GB", 6670 * MIB, 8 * GIB),
    )
    values = dict(budget_bytes=4 * GIB, fits=False, device="a card of 4 GB", alternatives=found)
    return make_plan(**{**values, **changes})


def shown(view, width=80, **console):
    stream = io.StringIO()
    Console(file=stream, width=width, **{"color_system": None, **console}).print(view)
    return stream.getvalue()


def words(text):
    return " ".join(text.split())


# --- a plan on a terminal ---------------------------------------------------------------------------------------------


def test_the_verdict_comes_first():
    assert shown(plan_view(make_plan())).splitlines()[1] == "Fits: 6.51 GiB of 8.00 GiB on NVIDIA GeForce RTX 4060"
    text = words(shown(plan_view(too_big())))
    assert "Does not fit: 6.51 GiB of 4.00 GiB on a card of 4 GB; the largest part is base (3.55 GiB)" in text


def test_verdict_is_green_or_red():
    for plan, color in ((make_plan(), "32m"), (too_big(), "31m")):
        line = shown(plan_view(plan), color_system="standard", force_terminal=True).splitlines()[1]
        assert line.startswith(f"\x1b[1;{color}")


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("plan", [make_plan(), too_big()], ids=["fits", "too big"])
def test_a_plan_is_whole_on_any_width_without_colours(plan, width):
    text = shown(plan_view(plan), width)
    assert "\x1b" not in text and "…" not in text and max(cell_len(line) for line in text.splitlines()) <= width
    flat = words(text)
    for part, size_bytes in plan.parts.items():
        assert (f"{LETTERS[part]} {part} {format_bytes(size_bytes)}" in flat) == (size_bytes > 0), part
    for size_bytes in plan.phases.values():
        assert format_bytes(size_bytes).split()[0] in flat  # on narrow terminals the unit is on a line of its own
    for wanted in ("torch holds up to 6.39 GiB", "3.20 GiB at its highest", "701.0 MiB", "72 optimizer steps", "3,072 tokens",
                   "about 1,234 tokens/s", "60 TFLOP/s", "lora.r 32", "Given: model.base=Qwen/Qwen3-8B", "q_proj, v_proj",
                   "The experts stay in 16 bits."):
        assert wanted in flat, wanted
    for key, decision in plan.decisions.items():
        assert (key in text) == (decision.source != "default"), key


def test_the_peak_is_marked_under_its_phase():
    lines = shown(plan_view(make_plan(phases={"load": 1 * GIB, "train": 2 * GIB, "merge": 3 * GIB}))).splitlines()
    heads, marks = next((lines[i], lines[i + 2]) for i, line in enumerate(lines) if line.split() == ["load", "train", "merge"])
    assert marks.rstrip().endswith("peak") and len(marks.rstrip()) == len(heads.rstrip())


def test_alternatives_come_with_what_to_type():
    text = words(shown(plan_view(too_big())))
    assert "rows of up to 512 tokens 3.91 GiB of 4.00 GiB data.max_length=512" in text
    assert "model.base=Qwen/Qwen3-1.7B" in text and "a card of 8 GB 6.51 GiB of 8.00 GiB --vram 8GB" in text
    assert "What fits instead" not in shown(plan_view(make_plan()))
    assert "Nothing near this fits" in shown(plan_view(too_big(alternatives=())))


def test_what_is_not_known_is_not_shown():
    plan = make_plan(num_steps=None, tokens_per_second=None, longest_length=None, kind="cpu", phases={}, notes=(), seconds=0.0)
    text = shown(plan_view(plan))
    for absent in ("optimizer step", "tokens/s", "fit at most", "torch holds", "planned in", "None"):
        assert absent not in text


def test_names_are_not_markup():
    plan = make_plan(model="/models/[bold]x[/bold]", device="[red]card", alternatives=())
    assert "[bold]x[/bold]" in shown(plan_view(plan)) and "[red]card" in shown(plan_view(plan))
    assert "[red]card" in shown(compare_view([plan])) and "[bold]x[/bold]" in words(shown(models_view([plan]), 120))


def test_a_terminal_that_knows_ascii_alone():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    Console(file=stream, width=80).print(MemoryBar(make_plan().parts, 8 * GIB))
    Console(file=stream, width=80).print(MemoryBar(too_big().parts, 4 * GIB))
    stream.flush()
    assert b"b====" in stream.buffer.getvalue()


# --- the bar ----------------------------------------------------------------------------------------------------------


def test_the_bar_is_to_scale():
    lines = shown(MemoryBar({"base": 3 * GIB, "activations": 1 * GIB}, 8 * GIB), width=81).splitlines()
    assert lines[0] == "b" + "█" * 29 + "v" + "█" * 9 + "." * 40 + "│"
    assert lines[1].strip() == "free 4.00 GiB, budget 8.00 GiB ^" and lines[1].index("^") == lines[0].index("│")


def test_overflow_is_hatched_behind_the_budget():
    lines = shown(MemoryBar({"base": 3 * GIB, "activations": 5 * GIB}, 4 * GIB), width=81).splitlines()
    assert lines[0] == "b" + "█" * 29 + "v" + "█" * 9 + "│" + "▒" * 40
    assert lines[1] == "budget 4.00 GiB ^".rjust(41) + "  4.00 GiB over" and lines[1].index("^") == lines[0].index("│")


@pytest.mark.parametrize("budget_bytes", [1, 100 * MIB, 4 * GIB, 8 * GIB, 6670 * MIB - 1, 6670 * MIB, 6670 * MIB + 1, 900 * GIB])
@pytest.mark.parametrize("width", [2, 3, 40, 79])
def test_rounding_never_hides_the_verdict(budget_bytes, width):
    parts = make_plan().parts
    budget_at, ends = scaled(parts, budget_bytes, width)
    used = list(ends.values())
    assert used == sorted(used) and 0 <= budget_at <= width >= used[-1]
    total_bytes = sum(parts.values())
    if total_bytes > budget_bytes:
        assert used[-1] > budget_at
    elif total_bytes < budget_bytes:
        assert used[-1] < budget_at
    else:
        assert used[-1] == budget_at


@pytest.mark.parametrize("parts, budget_bytes", [({}, 0), ({}, GIB), ({"base": 0}, 0), ({"base": GIB}, 0), ({"other": GIB}, GIB)])
def test_degenerate_bars_draw(parts, budget_bytes):
    assert shown(MemoryBar(parts, budget_bytes)).count("\n") == 2


def test_every_part_has_its_own_letter_and_colour():
    assert set(LETTERS) == set(PARTS) == set(PART_COLORS)
    assert len(set(LETTERS.values())) == len(PARTS) == len(set(PART_COLORS.values()))


def test_colours_differ_from_their_neighbours_in_grey():
    """People who see no colours, and prints: neighbours in the stack differ in brightness, or one of them is hatched."""
    from qlora.results.plan_plots import _HATCHES

    def brightness(color):
        return sum(share * int(color[i: i + 2], 16) for share, i in ((0.299, 1), (0.587, 3), (0.114, 5)))

    for one, other in zip(PARTS, PARTS[1:]):
        apart = abs(brightness(PART_COLORS[one]) - brightness(PART_COLORS[other]))
        assert apart > 25 or (one in _HATCHES) != (other in _HATCHES), (one, other)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_compare_has_one_row_a_card_on_80_columns():
    plans = [too_big(), make_plan(), make_plan(device="a card of 24 GB", budget_bytes=24 * GIB, tokens_per_second=None)]
    lines = shown(compare_view(plans)).splitlines()
    assert max(cell_len(line) for line in lines) <= 80
    rows = [line.split() for line in lines]
    assert "a card of 4 GB no 32 2 x 8 2,048 on paged_adamw_8bit 6.51/4.00 GiB 1,234".split() in rows
    assert "RTX 4060 yes 32 2 x 8 2,048 on paged_adamw_8bit 6.51/8.00 GiB 1,234".split() in rows
    assert "a card of 24 GB yes 32 2 x 8 2,048 on paged_adamw_8bit 6.51/24.00 GiB -".split() in rows
    assert "a card of 4 GB: 2.51 GiB too much; the largest part is base, 3.55 GiB" in lines


def test_models_has_one_row_a_model_on_80_columns():
    large = make_plan(model="mistralai/Mistral-Small-24B-Instruct-2501", fits=False, longest_length=None)
    lines = shown(models_view([make_plan(), large])).splitlines()
    assert lines[0] == "1 of 2 models fit on RTX 4060 (8.00 GiB)" and max(map(cell_len, lines)) <= 80
    assert "Qwen/Qwen3-8B 8.19B yes 32 2 3,072 6.51 GiB".split() in [line.split() for line in lines]
    assert "mistralai/Mistral-Small-24B-Instruct-2501 23.57B no 32 2 - 6.51 GiB".split() in [line.split() for line in lines]
    hopeless = make_plan(model="a/b", fits=False, parts=dict.fromkeys(PARTS, 0), decisions={}, longest_length=None, notes=("Why.",))
    text = shown(models_view([hopeless]))
    assert "a/b - no - - - -".split() in [line.split() for line in text.splitlines()] and text.endswith("\na/b: Why.\n")
    assert shown(models_view([], num_planned=49)).startswith("0 of 49 models fit\n")


# --- pictures ---------------------------------------------------------------------------------------------------------

EMPTY = make_plan(phases=dict.fromkeys(PHASES, 0), parts=dict.fromkeys(PARTS, 0), budget_bytes=0)
DEGENERATE = {
    "nothing": EMPTY, "no phases": make_plan(phases={}), "no budget": make_plan(budget_bytes=0), "too big": too_big(),
    "tiny": make_plan(parts={"base": 900}, phases={"load": 900}, budget_bytes=1000),
    "long names": make_plan(model="/srv/" + "m" * 90, device="NVIDIA RTX 5000 Ada Generation Laptop GPU with $signs_and_more$"),
}


def pixels(path):
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert image.shape[:2] == (675, 1200) and image[..., :3].std() > 0.01
    return image


@pytest.mark.filterwarnings("error:.*matplotlib", "error:.*[Gg]lyph", "error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("name", DEGENERATE)
def test_every_plan_draws(name, tmp_path):
    plan = DEGENERATE[name]
    pixels(draw_plan(plan, tmp_path / "plan.png"))
    pixels(draw_compare([plan, make_plan()], tmp_path / "compare.png"))
    pixels(draw_compare([plan], tmp_path / "one.png"))
    pixels(draw_planned_measured(plan.phases, {}, plan.budget_bytes, tmp_path / "phases.png"))


def test_many_cards_draw(tmp_path):
    plans = [make_plan(device=f"card number {n}", budget_bytes=n * GIB) for n in range(1, 25)]
    pixels(draw_compare(plans, tmp_path / "compare.png"))
    with pytest.raises(OutputError, match="no plan to draw"):
        draw_compare([], tmp_path / "none.png")


def test_pictures_show_what_they_are_given(tmp_path):
    """Change a figure, and the picture changes."""
    plan, found = make_plan(), dict(make_plan().phases)
    first = pixels(draw_plan(plan, tmp_path / "a.png"))
    for changed in (replace(plan, budget_bytes=7 * GIB), replace(plan, phases={**plan.phases, "merge": 4 * GIB}),
                    replace(plan, parts={**plan.parts, "loss": 0}), replace(plan, fits=False)):
        assert (pixels(draw_plan(changed, tmp_path / "b.png")) != first).any()
    small, smaller = (draw_plan(too_big(budget_bytes=size * GIB), tmp_path / f"{size}.png") for size in (5, 4))
    assert (pixels(small) != pixels(smaller)).any()  # the peak sets the scale here, so that the line alone has moved
    first = pixels(draw_planned_measured(found, found, 8 * GIB, tmp_path / "c.png"))
    for other in ({**found, "train": 7 * GIB}, {k: v for k, v in found.items() if k != "merge"}):
        assert (pixels(draw_planned_measured(found, other, 8 * GIB, tmp_path / "d.png")) != first).any()


def test_pictures_say_where_they_cannot_go(tmp_path):
    for path, problem in ((tmp_path / "a.pdf", "does not end in .png"), (tmp_path / "no" / "a.png", "There is no folder")):
        with pytest.raises(OutputError, match=problem):
            check_picture(path)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_picture(tmp_path / "b.png")
    with pytest.raises(OutputError, match="cannot be written"):
        draw_plan(make_plan(), tmp_path / "b.png")


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_sets_the_plan_against_the_measurement(tmp_path):
    planned, measured = {"load": 1020, "train": 2000, "merge": 5}, {"load": 1000, "train": 2010, "eval": 7}
    summary = make_summary(planned_phases=planned, measured_phases=measured)
    draw_planned_measured(planned, measured, 4000, (tmp_path / "plots").mkdir() or tmp_path / "plots" / "memory.png")
    text = write_report(summary, tmp_path).read_text(encoding="utf-8")
    section = text.split("## Memory\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("|")][2:]
    assert [(row[0].strip("| "), row[-1].strip("| ")) for row in rows] == [
        ("load", "+2.00 %"), ("train", "-0.50 %"), ("merge", "-"), ("eval", "-"),
    ]
    assert "1,020 bytes" in rows[0][1] and "1,000 bytes" in rows[0][2] and rows[2][2] == "-" and rows[3][1] == "-"
    assert "(plots/memory.png)" in section
    assert load_report(tmp_path) == summary


def test_report_without_a_plan_has_no_memory_section(tmp_path):
    """Reports of older runs have no such field."""
    summary = make_summary()
    text = write_report(summary, tmp_path).read_text(encoding="utf-8")
    assert "## Memory" not in text and memory_by_phase(summary) == []
    document = json.loads((tmp_path / "report.json").read_text())
    del document["planned_phases"], document["measured_phases"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert load_report(tmp_path) == summary


# --- a plan as a recipe -----------------------------------------------------------------------------------------------


def test_a_frozen_plan_loads_as_the_same_run(tmp_path):
    (tmp_path / "data").mkdir()
    rows = tmp_path / "data" / "rows.jsonl"
    rows.write_text("{}\n")
    recipe = build_recipe(model="Qwen/Qwen3-8B", data=str(rows), output="somewhere", hub={"repo": "me/it", "private": False})
    plan = make_plan(decisions={**make_plan().decisions, "data.path": Decision(str(rows), "given", "given")})
    path = tmp_path / "mine.yaml"
    write_frozen(plan, path, recipe=recipe, command="qlora plan first.yaml --vram 8GB")
    frozen = load_recipe(path)
    for key, value in plan.settings.items():
        section, _, name = key.partition(".")
        if key == "memory.streamed_layers":  # decided, but not a setting of a recipe
            continue
        found, given = getattr(getattr(frozen, section), name), frozen.is_given(key)
        assert (found, given) == (value, True) or key in ("data.validation", "train.epochs"), key
    assert not frozen.is_given("data.validation") and not frozen.is_given("train.epochs")
    assert (frozen.output.dir, frozen.hub.repo, frozen.hub.private) == ("somewhere", "me/it", False)
    text = path.read_text(encoding="utf-8")
    assert "  path: data/rows.jsonl\n" in text and str(tmp_path) not in text.split("\n\n", 1)[1]
    assert "  checkpointing: true  # without it the rows do not fit\n" in text and "  alpha: 32  # alpha = r\n" in text
    header = text.split("\n\n")[0].splitlines()
    assert header[0].startswith("#!") and all(line.startswith("#") for line in header)
    assert "6.51 GiB of 8.00 GiB" in text and f"qlora train {path}" in text and "qlora plan first.yaml --vram 8GB" in text


def test_a_plan_without_data_leaves_a_place_for_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(frozen_recipe(make_plan(), path, command="qlora plan\nmodel: evil"))
    frozen = load_recipe(path)
    assert frozen.data.path == str(tmp_path / "my-rows.jsonl") and frozen.model.base == "Qwen/Qwen3-8B"
    assert not frozen.is_given("data.format") and not frozen.is_given("train.eval_every")


def test_the_ram_that_happened_to_be_free_is_not_frozen(tmp_path):
    path, recipe = tmp_path / "mine.yaml", build_recipe(model="Qwen/Qwen3-8B", data="rows.jsonl")
    decisions = make_plan().decisions
    write_frozen(make_plan(kind="cpu"), path, recipe=recipe)
    assert load_recipe(path).memory.budget == "auto"
    given = {**decisions, "memory.budget": Decision("8GB", "given", "given"), "train.eval_every": Decision(9, "given", "given")}
    path.write_text(frozen_recipe(make_plan(kind="cpu", decisions=given), path))
    assert load_recipe(path).memory.budget == "8GB" and load_recipe(path).train.eval_every == 9


def test_a_frozen_plan_replaces_nothing_unasked(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kept")
    with pytest.raises(OutputError, match="is there already"):
        write_frozen(make_plan(), path)
    with pytest.raises(OutputError, match="does not fit"):
        write_frozen(too_big(), path, force=True)
    assert path.read_text() == "kept"
    write_frozen(make_plan(), path, force=True)
    assert load_recipe(path).lora.r == 32


def test_rows_named_on_the_command_line_are_found_from_the_new_recipe(tmp_path, monkeypatch):
    """A path in an override is relative to where the command runs, one in a recipe to the recipe."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    recipe = build_recipe(model="Qwen/Qwen3-8B", data="rows.jsonl")
    write_frozen(make_plan(), Path("mine/a.yaml"), recipe=recipe)
    assert load_recipe("mine/a.yaml").data.path == str(tmp_path / "rows.jsonl")
