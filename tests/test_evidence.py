"""Evidence behind the documentation: what counts, what is fitted to it, and what is drawn."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.errors import OutputError
from qlora.measuring.lines import read_lines
from qlora.measuring.summary import summarise
from qlora.planning.plan import Decision
from qlora.results.evidence_plots import Curve, Point, draw_plan_against_measured, draw_scale
from qlora.units import MIB


def script(root, name):
    """A file of scripts/ as a module, as itself and as what the others there import it as."""
    spec = importlib.util.spec_from_file_location(name, root / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scale(root, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return script(root, "scale")


@pytest.fixture
def recipes(root, tmp_path, monkeypatch):
    """scripts/recipe_evidence.py over a folder of recipes of its own."""
    module = script(root, "recipe_evidence")
    monkeypatch.setattr(module, "RECIPES", tmp_path)
    (tmp_path / "a.yaml").write_text("# Card  a GPU with 4 GB\nmodel: m\ndata: rows.jsonl\n")
    return module


def test_evidence_of_a_recipe_that_has_changed_counts_no_longer(recipes, tmp_path):
    path, file = tmp_path / "a.yaml", tmp_path / "lines.jsonl"
    recipes._append(file, {"recipe": "a.yaml", "digest": recipes.digest(path), "n": 1})
    recipes._append(file, {"recipe": "a.yaml", "digest": recipes.digest(path), "n": 2})
    recipes._append(file, {"recipe": "gone.yaml", "digest": "0", "n": 3})
    assert [(name, line["n"]) for name, line in recipes.lines_of(file).items()] == [("a.yaml", 2)]
    path.write_text("# other words\n" + path.read_text())
    assert recipes.lines_of(file)
    path.write_text(path.read_text() + "lora: {r: 8}\n")
    assert not recipes.lines_of(file) and not recipes.lines_of(tmp_path / "missing.jsonl")


def test_every_recipe_is_planned_as_it_stands(root):
    """`python scripts/recipe_evidence.py plan` mends it."""
    module = script(root, "recipe_evidence")
    names = {path.name for path in (root / "recipes").glob("*.yaml")}
    planned = module.lines_of(module.PLANNED)
    assert set(planned) == names and all(line["fits"] for line in planned.values())
    run = module.lines_of(module.RUN)
    assert "quickstart.yaml" in run and all(line["measured_bytes"] > 0 for line in run.values())


def test_a_run_counts_where_it_is_of_the_recipe_as_it_stands(recipes, tmp_path, monkeypatch):
    from test_results import make_summary  # of a run that never was

    path = tmp_path / "a.yaml"
    usual = make_summary()
    settings = {**usual.settings, "model.weights": Decision("pretrained", "default", "")}
    made = replace(usual, settings=settings, command=f"qlora train {path} output.dir=elsewhere",
                   planned_phases={"train": 8 * MIB, "merge": 90 * MIB}, measured_phases={"train": 9 * MIB, "eval": 50 * MIB})
    monkeypatch.setattr("qlora.results.report.load_report", lambda folder: made)
    line = recipes.run_line(Path("run"))
    assert (line["planned_bytes"], line["measured_bytes"]) == (8 * MIB, 9 * MIB)  # of the phases that both know
    assert line["command"] == "qlora train recipes/a.yaml" and str(tmp_path) not in json.dumps(line)
    assert line["loss"] == [made.before.loss, made.after.loss]
    others = {f"qlora train {path} lora.r=4": "lora.r=4", "qlora train other.yaml": "no run of a recipe", "": "Python"}
    for command, problem in others.items():
        made = replace(made, command=command)
        with pytest.raises(SystemExit, match=problem):
            recipes.run_line(Path("run"))


def test_what_was_measured_here_can_be_shown(root):
    """Evidence names no machine and no folder, and none of it failed."""
    files = sorted((root / "scripts" / "evidence").glob("*.jsonl"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    assert files and not [word for word in ("/tmp", "/home", "/root", "/work", "\\\\Users", "hostname") if word in text]
    lines = read_lines(*files)
    found = summarise([line for line in lines if line["kind"] == "cpu"])
    assert found.num_failed == found.num_out_of_memory == found.num_over_margin == found.num_over_budget == 0
    assert found.num_measured >= 10 and abs(found.worst_error) < 2


def test_the_page_shows_what_was_measured(root):
    """`python scripts/plots.py` mends it."""
    module = script(root, "plots")
    assert module.TABLE.text() == module.measured_table()


# --- scale -------------------------------------------------------------------------------------------------------------


def a_curve(x, y, parts=None):
    parts = parts or [{"activations": size, "loss": 0} for size in y]
    return Curve("length", "tokens", x, y, y, [1e-6] * len(x), [1e-6] * len(x), parts)


def test_slopes_and_bends(scale):
    x = [1, 2, 4, 8]
    assert scale.slope(x, [3 * n + 5 for n in x]) == pytest.approx((3, 5))
    assert scale.bends(a_curve(x, [1000 * n for n in x])) == []
    parts = [{"activations": 1000 * n, "loss": max(0, 500 * (n - 4)), "margin": 9**n} for n in x]
    told, = scale.bends(a_curve(x, [each["activations"] + each["loss"] for each in parts], parts))
    assert told == ("length, from 4 on: +1,500 bytes per token after +1,000 bytes per token; what changes most in the plan's peak is "
                    "loss (+500 bytes)")


def test_the_curves_share_a_point_and_change_one_thing(scale):
    base = str(scale.cell())
    for axis in scale.axes():
        words = [set(str(cell).split()) for cell in axis.cells.values()]
        assert base in map(str, axis.cells.values())
        assert all(len(other - words[0]) <= 1 for other in words)
        assert list(axis.cells) == sorted(axis.cells)


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_drawn(tmp_path, scale):
    from matplotlib.image import imread

    points = [Point(100 * MIB, 101 * MIB, "a card"), Point(3 * MIB, 3 * MIB, "another")]
    drawn = [draw_plan_against_measured(points, tmp_path / "a.png"),
             draw_scale([a_curve([1, 2], [MIB, 2 * MIB])] * 3, tmp_path / "b.png")]
    assert all(imread(path).std() > 0.01 for path in drawn)
    with pytest.raises(OutputError, match="nothing measured"):
        draw_plan_against_measured([], tmp_path / "a.png")
    for draw in (lambda path: draw_plan_against_measured(points, path), lambda path: draw_scale([a_curve([1, 2], [1, 2])], path)):
        with pytest.raises(OutputError, match="cannot be written"):
            draw(tmp_path / "missing" / "a.png")
