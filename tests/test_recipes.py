"""The recipes that are shipped: each one loads, says what it needs, and works with the rows beside it."""

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from qlora.catalog import catalog_entry, find_id
from qlora.recipe import load_recipe
from qlora.units import format_count

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PATHS = sorted(RECIPES.glob("*.yaml"))
REAL = [path for path in PATHS if "builtin:tiny" not in path.read_text(encoding="utf-8")]
ROWS = {"chat.jsonl": 40, "instructions.json": 60, "tool-calls.json": 40, "korean-qa.csv": 60}


def script(name):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES.parent / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs():
    return script("update_docs")


def test_there_are_recipes():
    assert len(PATHS) > 10
    assert len(REAL) > 10


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recipe_loads_and_runs_by_itself(path, docs):
    recipe = load_recipe(path)
    assert recipe.model.base == "builtin:tiny" or find_id(recipe.model.base) == recipe.model.base
    assert Path(recipe.data.path).is_file()
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env -S qlora train\n# ")
    if os.name != "nt":
        assert os.access(path, os.X_OK)
    assert docs.header(path)["title"]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_header_is_true(path, docs):
    """Card, download and licence are those of this very model, and both commands are about this very file."""
    parts, recipe = docs.header(path), load_recipe(path)
    gate = recipe.model.base.startswith(("meta-llama/", "google/"))
    assert parts["Licence"].startswith("gated: " if gate else "Apache-2.0")
    if gate:
        assert f"https://huggingface.co/{recipe.model.base}," in parts["Licence"]
        assert "hf auth login" in parts["Licence"]
    assert f" {format_count(catalog_entry(recipe.model.base).parameters)} parameters" in parts["Download"]
    assert parts["Run"] == f"qlora train recipes/{path.name}"
    command, verb, file, *overrides = shlex.split(parts["Override"])
    assert [command, verb, file] == ["qlora", "train", f"recipes/{path.name}"]
    assert len(overrides) == 2
    changed = load_recipe(path, overrides)
    assert changed != recipe
    assert changed.data.path == overrides[0].removeprefix("data.path=")
    tier = re.search(r"-(\d+)gb$", path.stem)
    card = re.search(r"a GPU with (\d+) GB", parts["Card"])[1]
    assert recipe.memory.budget == (f"{card}GB" if tier else "auto")
    assert not tier or tier[1] == card


@pytest.mark.parametrize("path", sorted({Path(load_recipe(p).data.path) for p in PATHS}), ids=lambda path: path.name)
def test_sample_rows_are_clean(path):
    from qlora.data import prepare

    data = prepare(str(path), None)
    assert len(data.rowset.rows) >= ROWS.get(path.name, 1)
    assert not [finding for finding in data.findings if finding.level == "error"]
    assert (data.bad_rows, data.rowset.num_duplicates) == ([], 0)


def test_tool_calls_name_tools_that_are_there():
    """Every call is to a tool of its row, with exactly the arguments that the tool requires."""
    rows = json.loads((RECIPES / "data" / "tool-calls.json").read_text(encoding="utf-8"))
    calls = 0
    for row in rows:
        tools = {tool["name"]: tool["parameters"] for tool in json.loads(row["tools"])}
        for turn in row["conversations"]:
            if turn["from"] == "function_call":
                call = json.loads(turn["value"])
                assert set(call["arguments"]) == set(tools[call["name"]]["required"])
                calls += 1
    assert calls > 40


def test_tool_calls_are_what_the_script_writes():
    made = script("make_sample_data")
    assert made.TARGET.read_text(encoding="utf-8") == made.render()


def test_tables_in_the_readme_are_up_to_date(docs, tmp_path, monkeypatch):
    """`python scripts/update_docs.py` mends it."""
    text = docs.README.read_text(encoding="utf-8")
    assert docs.out_of_date() == []
    page = tmp_path / "README.md"
    page.write_text(text.replace("| `lora.r` |", "| `lora.rank` |"), encoding="utf-8")
    monkeypatch.setattr(docs, "README", page)
    monkeypatch.setattr(docs.sys, "argv", ["update_docs.py"])
    assert docs.out_of_date() == ["settings"]
    assert docs.main() == 0
    assert page.read_text(encoding="utf-8") == text


def test_a_page_that_lacks_a_mark_is_left_as_it_is(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- sizes: written by it -->\nno end\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks <!-- end of sizes -->: put it where"):
        script("pages").Place(page, "sizes", "it").write("| 1 |")
    assert page.read_text(encoding="utf-8").endswith("no end\n")
