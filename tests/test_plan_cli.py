"""`qlora plan` and `qlora models`: what they are asked, what they answer, and what they say to nonsense.

Most tests put known plans in the planner's place, so that what they see is the command line's own.
"""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_plan_views import make_plan, too_big

from qlora.catalog import catalog_ids
from qlora.cli import main
from qlora.recipe import load_recipe
from qlora.units import GIB

MODEL = ["plan", "--model", "Qwen/Qwen3-8B"]


class FakePlanner(types.ModuleType):
    """Answers every question with a plan that fits on cards sold with 8 GB or more, and remembers what it was asked."""

    def __init__(self):
        super().__init__("qlora.training.planner")
        self.asked = []

    def _answer(self, device, **asked):
        self.asked.append({"device": device, **asked})
        budget_bytes = device.memory_bytes if device is not None else 8 * GIB
        changes = {"device": device.name if device is not None else "this machine", "budget_bytes": budget_bytes}
        return make_plan(**changes) if budget_bytes > 7 * GIB else too_big(**changes)

    def plan_recipe(self, recipe, *, device=None, progress=None):
        return self._answer(device, recipe=recipe)

    def plan_model(self, model, *, device, overrides=(), progress=None):
        return self._answer(device, model=model, overrides=list(overrides))

    def compare(self, plan_for, devices, progress=None):
        return [plan_for(device) for device in devices]

    def plan_catalog(self, device, progress=None):
        progress.note("planning 49 models")
        plans = [make_plan(model=id, fits="70B" not in id, device=device.name) for id in catalog_ids()]
        return plans[::-1]


@pytest.fixture
def planner(monkeypatch):
    fake = FakePlanner()
    monkeypatch.setitem(sys.modules, "qlora.training.planner", fake)
    monkeypatch.delattr("qlora.training.planner", raising=False)
    return fake


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "first.yaml"
    path.write_text("model: Qwen/Qwen3-8B\ndata: rows.jsonl\nmemory: {budget: 4GB, device: cpu}\n")
    return path


def sold_gb(device):
    """The size on the box; CUDA sees a little less."""
    return round(device.memory_bytes / GIB)


def words(text):
    return " ".join(text.split())


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_a_recipe_on_this_machine_is_planned_as_it_is(planner, recipe_file, capsys):
    assert main(["plan", str(recipe_file), "lora.r=64"]) == 0
    (asked,) = planner.asked
    assert asked["device"] is None and asked["recipe"].lora.r == 64
    assert (asked["recipe"].memory.budget, asked["recipe"].memory.device) == ("4GB", "cpu")
    shown = capsys.readouterr()
    assert "Fits: 6.51 GiB of 8.00 GiB on this machine" in shown.out and shown.err == ""


def test_a_named_card_counts_more_than_the_recipe(planner, recipe_file, capsys):
    assert main(["plan", str(recipe_file), "--vram", "24GB"]) == 0
    (asked,) = planner.asked
    assert sold_gb(asked["device"]) == 24 and asked["device"].kind == "cuda"
    assert (asked["recipe"].memory.budget, asked["recipe"].memory.device) == ("auto", "auto")
    note = "The recipe says memory.budget: 4GB; the card that is named here counts instead."
    assert note in words(capsys.readouterr().err)


def test_a_budget_on_the_command_line_counts_more_than_the_card(planner, recipe_file):
    assert main(["plan", str(recipe_file), "--gpu", "RTX 4090", "memory.budget=6GB"]) == 0
    (asked,) = planner.asked
    assert "4090" in asked["device"].name and asked["recipe"].memory.budget == "6GB"


def test_cpu_asks_for_the_cpu(planner, recipe_file):
    assert main(["plan", str(recipe_file), "--cpu", "memory.device=auto"]) == 0
    assert planner.asked[0]["device"] is None and planner.asked[0]["recipe"].memory.device == "cpu"
    assert main([*MODEL, "--cpu"]) == 0
    assert planner.asked[1]["device"].kind == "cpu"


@pytest.mark.parametrize("arguments", [
    ["plan", "--model", "Qwen/Qwen3-8B", "data.max_length=512", "lora.r=8", "--vram", "8GB"],
    ["plan", "--model", "Qwen/Qwen3-8B", "--vram", "8GB", "data.max_length=512", "lora.r=8"],
    ["plan", "data.max_length=512", "--vram=8GB", "lora.r=8", "--model", "Qwen/Qwen3-8B"],
])
def test_words_may_come_in_any_order(arguments, planner):
    assert main(arguments) == 0
    (asked,) = planner.asked
    assert (asked["model"], sorted(asked["overrides"])) == ("Qwen/Qwen3-8B", ["data.max_length=512", "lora.r=8"])


def test_a_card_and_a_size_name_a_variant(planner):
    assert main([*MODEL, "--gpu", "RTX 3060", "--vram", "8GB"]) == 0
    device = planner.asked[0]["device"]
    assert "3060" in device.name and sold_gb(device) == 8


# --- what is answered -------------------------------------------------------------------------------------------------


def test_json_is_alone_on_stdout(planner, capsys):
    assert main([*MODEL, "--vram", "8", "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["fits"] is True and document["settings"]["r"] == 32 and document["peak_phase"] == "train"
    assert document["peak_bytes"] == sum(document["parts"].values()) <= document["budget_bytes"]
    assert "8" in shown.err and "GB" in shown.err  # how a size without a unit was read


def test_what_does_not_fit_exits_with_2_and_says_what_does(planner, capsys):
    assert main([*MODEL, "--vram", "4GB", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is False and document["alternatives"][0]["overrides"] == ["data.max_length=512"]
    assert main([*MODEL, "--vram", "4GB"]) == 2
    shown = capsys.readouterr()
    assert "Does not fit" in shown.out and "data.max_length=512" in shown.out and shown.err == ""


def test_compare_is_one_table(planner, capsys):
    assert main([*MODEL, "--compare", "4, 8GB,RTX 3060,24"]) == 0
    assert [sold_gb(asked["device"]) for asked in planner.asked] == [4, 8, 12, 24]
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert "4, 24: read as sizes in GB." in shown.err
    assert [line.split().count("yes") for line in lines if " 2 x 8 " in line] == [0, 1, 1, 1]
    assert main([*MODEL, "--compare", "4"]) == 2
    capsys.readouterr()
    assert main([*MODEL, "--compare", "4,8", "--json"]) == 0
    assert [plan["fits"] for plan in json.loads(capsys.readouterr().out)] == [False, True]


def test_models_are_sorted_by_size(planner, capsys):
    assert main(["models", "--vram", "8GB", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    counts = [plan["num_parameters"] for plan in found]
    assert len(found) == len(catalog_ids()) and counts == sorted(counts) and "planning 49 models" in shown.err
    assert main(["models", "--vram", "8GB", "--fits", "--json"]) == 0
    fitting = json.loads(capsys.readouterr().out)
    assert 0 < len(fitting) < len(found) and all(plan["fits"] for plan in fitting)
    assert main(["models", "--gpu", "RTX 3060", "--fits"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{len(fitting)} of {len(found)} models fit") and "Llama-3.1-70B" not in text
    assert len([line for line in text.splitlines() if " yes " in line]) == len(fitting)


def test_plot_draws(planner, tmp_path, capsys):
    for name, words_ in (("one.png", ["--vram", "8GB"]), ("many.png", ["--compare", "8,12"])):
        assert main([*MODEL, *words_, "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "many.png").read_bytes()
    assert "one.png" in capsys.readouterr().err


def test_write_makes_a_recipe_that_loads(planner, recipe_file, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    assert main(["plan", str(recipe_file), "--vram", "8GB", "--write", str(mine), "--json"]) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert f"qlora train {mine}" in shown.err.replace("\n", "") and load_recipe(mine).lora.r == 32
    header = mine.read_text().split("\n\n")[0]
    assert f"qlora plan {recipe_file} --vram 8GB --write {mine} --json" in header
    assert main([*MODEL, "--vram", "8GB", "--write", str(mine), "--force"]) == 0
    assert main([*MODEL, "--vram", "4GB", "--write", str(mine), "--force"]) == 2
    assert "was not written, because the plan does not fit" in words(capsys.readouterr().err)
    assert load_recipe(mine).lora.r == 32


@pytest.mark.parametrize("verb", ["plan", "models"])
def test_help_teaches_with_commands(verb):
    script = (f"import sys; from qlora.cli import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
              "print('torch' in sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False" and done.stdout.count(f"\n  qlora {verb} ") >= 3


@pytest.mark.parametrize("verb", ["plan", "models"])
def test_every_example_of_the_help_is_understood(verb, root, capsys):
    """Words that argparse would refuse, or that the file system does not know, have no place in an example."""
    import shlex

    from qlora.arguments import build_parser

    with pytest.raises(SystemExit):
        main([verb, "--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  qlora {verb} ")]
    assert len(examples) >= 3
    for line in examples:
        command = re.split(r"\s{2,}", line.strip())[0]
        options, rest = build_parser().parse_known_args(shlex.split(command)[1:])
        assert not [word for word in rest if "=" not in word], command
        assert all((root / word).is_file() for word in getattr(options, "overrides", []) if word.endswith(".yaml")), command


def test_no_verb_prints_a_traceback_into_a_terminal_without_unicode(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_plan_cli import FakePlanner\n"
        "sys.modules['qlora.training.planner'] = FakePlanner()\nfrom qlora.cli import main\n"
        "sys.exit(main(['plan', '--model', 'Qwen/Qwen3-8B', '--vram', '8GB']))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert b"Fits:" in done.stdout and b"b=====" in done.stdout and b"\x1b" not in done.stdout


# --- nonsense ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem", "fix"),
    [
        (["plan"], "There is nothing to plan", "--model"),
        (["plan", "{recipe}", "--model", "Qwen/Qwen3-8B"], "Both the recipe", "model.base=Qwen/Qwen3-8B"),
        (["plan", "{recipe}", "other.yaml"], "both taken for recipes", "section.setting=value"),
        ([*MODEL, "--vram", "8GB", "--cpu"], "--cpu and --vram name two devices", "memory.budget=8GB"),
        ([*MODEL, "--gpu", "RTX 4060", "--cpu"], "--cpu and --gpu name two devices", "Leave one out"),
        ([*MODEL, "--compare", "8", "--vram", "8GB"], "--compare names cards, and so does --vram", "RTX 4090"),
        ([*MODEL, "--compare", "8", "--cpu"], "--compare names cards, and so does --cpu", "Put every card"),
        ([*MODEL, "--compare", "8", "--write", "a.yaml"], "--write keeps one", "name one card"),
        ([*MODEL, "data=mine.jsonl"], "data=mine.jsonl names rows", "recipe"),
        ([*MODEL, "--compare", " , "], "--compare names no card", "4,8,12"),
        ([*MODEL, "--compare", "8GB,RTX 9999"], "RTX 9999", "RTX"),
        ([*MODEL, "--gpu", "RTX 4061"], "RTX 4061", "RTX 4060"),
        (["models", "--gpu", "RTX 4070 Supper"], "RTX 4070 Supper", "RTX 4070 SUPER"),
        ([*MODEL, "--vram", "0"], "0", "8GB"),
        ([*MODEL, "--vram", "-3GB"], "-3GB", "8GB"),
        ([*MODEL, "--vram=-3"], "-3", "8GB"),
        ([*MODEL, "--compare", "-4,8"], "-4", "8GB"),
        ([*MODEL, "--vram", "lots"], "lots", "8GB"),
        ([*MODEL, "--plot", "{folder}/plan.pdf"], "does not end in .png", "plan.png"),
        ([*MODEL, "--plot", "{folder}/none/plan.png"], "There is no folder", "Make it first"),
        ([*MODEL, "--write", "{recipe}"], "is there already, and nothing is overwritten", "--force"),
        ([*MODEL, "--write", "{folder}"], "is a folder", "my.yaml"),
        (["plan", "{folder}/nowhere.yaml"], "There is no recipe at", "recipe"),
        (["plan", "{recipe}", "lora.rank=8"], "unknown setting lora.rank", "Did you mean lora.r?"),
    ],
)
def test_nonsense_gets_one_message_with_the_fix(arguments, problem, fix, planner, recipe_file, capsys):
    before = recipe_file.read_text()
    words_ = [word.format(recipe=recipe_file, folder=recipe_file.parent) for word in arguments]
    assert main(words_) == 2
    shown = capsys.readouterr()
    text = words(shown.err)
    assert text.startswith("error: ") and problem in text and fix in text, text
    assert "Traceback" not in text and shown.out == "" and not planner.asked
    assert recipe_file.read_text() == before


@pytest.fixture
def model_folder(tmp_path):
    """Makes a folder whose config.json says what it is given."""

    def make(name, **config):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def test_models_that_cannot_be_planned_say_why(model_folder, tmp_path, capsys):
    """The real planner; every one of these ends before anything is simulated."""
    llama = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, vocab_size=320, intermediate_size=128)
    (tmp_path / "empty").mkdir()
    cases = [
        ("Qwen/Qwen3-8C", "is not in the cache", "Qwen/Qwen3-8B"),
        (tmp_path / "empty", "has no config.json", "saved into"),
        (tmp_path / "nowhere", "There is no folder", "config.json"),
        ("builtin:huge", "There is no built-in model", "builtin:tiny"),
        (model_folder("encoder", model_type="bert"), "is an encoder", "Qwen/Qwen3-0.6B"),
        (model_folder("seq2seq", model_type="t5"), "is an encoder-decoder", "Qwen/Qwen3-0.6B"),
        (model_folder("unknown", model_type="lama"), "does not know the model type 'lama'", "llama"),
        (model_folder("wrong", **llama, num_attention_heads=5), "cannot", "config.json"),
    ]
    for model, problem, fix in cases:
        assert main(["plan", "--model", str(model), "--vram", "8GB"]) == 2
        shown = capsys.readouterr()
        text = words(shown.err)
        assert "error: " in text and problem in text and fix in text, text
        assert "Traceback" not in text and shown.out == ""


def test_a_small_model_is_planned_written_and_planned_again(small_model, rows_file, tmp_path, capsys, monkeypatch):
    """The real planner from end to end: the recipe that it leaves asks for the plan that it made."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    first, mine = tmp_path / "first.yaml", tmp_path / "mine.yaml"
    first.write_text(f"model: {small_model}\ndata: {rows_file}\ntrain: {{sample_rows: 4}}\n")
    assert main(["plan", str(first), "--cpu", "--write", str(mine), "--plot", str(tmp_path / "plan.png")]) == 0
    shown = capsys.readouterr()
    assert "Fits: " in shown.out and str(mine) in shown.err.replace("\n", "")
    plans = []
    for recipe in ([str(first), "--cpu"], [str(mine)]):
        assert main(["plan", *recipe, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    one, other = plans
    assert (one["parts"], one["phases"], one["num_steps"]) == (other["parts"], other["phases"], other["num_steps"])
    differing = {key for key, value in one["settings"].items() if other["settings"][key] != value}
    assert differing <= {"budget"} and one["settings"]["r"] >= 16


def test_a_budget_below_the_context_names_both_numbers(capsys):
    assert main([*MODEL, "--vram", "256MB"]) == 2
    text = words(capsys.readouterr().err)
    assert text.startswith("error: ") and "CUDA alone takes" in text and text.count("MiB") >= 2
