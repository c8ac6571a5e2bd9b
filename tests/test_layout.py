"""The shape of the code: imports point down, start-up is light, nothing names what it must not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# A module may import from its own level and from those before it.
LEVELS = [
    ["errors", "units", "home", "redact", "durable"],
    ["settings"],
    ["recipe", "progress", "evaluation"],
    ["hardware", "_compat", "data"],
    ["precision", "guidance", "catalog"],
    ["architecture", "generation"],
    ["model", "engine"],
    ["planning"],
    ["results", "hub", "training", "merging", "exporting", "adapted", "chatting", "comparing", "sweeping", "measuring"],
    ["console", "views", "arguments", "plan_words"],
    ["cli"],
    ["__init__", "__main__"],
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def modules(root):
    return sorted((root / "qlora").rglob("*.py"))


def top(path, root):
    return path.relative_to(root / "qlora").parts[0].removesuffix(".py")


def imported(path, with_type_checking=False):
    """Names of the qlora modules that a file imports, anywhere in it, but for those needed by annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not with_type_checking:
            skipped.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "qlora":
                yield from (f"qlora.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_down(root):
    wrong = []
    for path in modules(root):
        here = top(path, root)
        assert here in LEVEL, f"{path} has no place in the layout"
        for name in imported(path):
            if name.startswith("qlora."):
                there = name.split(".")[1]
                if there in LEVEL and LEVEL[there] > LEVEL[here]:
                    wrong.append(f"{here} imports {there}")
    assert not wrong
    assert len(modules(root)) > 20


def test_planning_and_data_know_nothing_of_training(root):
    for path in modules(root):
        if top(path, root) in ("planning", "data", "results"):
            assert not [n for n in imported(path, True) if n.startswith("qlora.training")], path
        if top(path, root) == "data":
            assert not [n for n in imported(path, True) if n.startswith("qlora.planning")], path


def test_trl_has_one_door(root):
    users = [path.name for path in modules(root) if any(n.split(".")[0] == "trl" for n in imported(path))]
    assert users == ["trainer.py"]


def test_only_the_command_line_prints(root):
    for path in modules(root):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
        assert not calls or path.name == "cli.py", path


@pytest.mark.parametrize("statement", ["import qlora", "import qlora.recipe", "import qlora.cli"])
def test_start_up_is_light(statement):
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'matplotlib'}"
    script = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_needs_no_heavy_import():
    script = ("import sys; from qlora.cli import main\n"
              "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
              "print('torch' in sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False" and "lora.r = auto" in done.stdout


def test_public_names_load():
    import qlora

    assert all(getattr(qlora, name) is not None for name in qlora.__all__)


def test_files_stay_short(root):
    long = {str(p.relative_to(root)): n for p in modules(root) if (n := len(Path(p).read_text().splitlines())) > 420}
    assert not long
