"""The command line as a person meets it: exit codes, one block on stderr, no traceback."""

import json
import subprocess
import sys

import pytest

from qlora.cli import main


def run(*arguments):
    """A real process, as in a shell."""
    return subprocess.run([sys.executable, "-m", "qlora", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def recipe_file(tmp_path, small_model, rows_file):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {small_model}\ndata: {rows_file}\nmemory: {{device: cpu}}\n"
        f"train: {{max_steps: 2, batch: 8, sample_rows: 4}}\noutput: {tmp_path / 'out'}\n"
    )
    return path


def test_train_prints_a_summary_and_exits_with_0(recipe_file, tmp_path):
    done = run("train", recipe_file, "lora.r=8")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "exact match" in done.stdout and "peak memory" in done.stdout
    assert str(tmp_path / "out" / "report.md") in done.stdout
    assert "lora.r=8" in done.stderr  # the plan names what was given
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["lora.r"]["value"] == 8
    assert report["command"] == f"qlora train {recipe_file} lora.r=8"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "nowhere.yaml"], "There is no recipe at nowhere.yaml"),
        (["train", "{recipe}", "lora.rank=8"], "Did you mean lora.r?"),
        (["train", "{recipe}", "model=/nowhere/model"], "/nowhere/model"),
        (["train", "{recipe}", "data.path=/nowhere/rows.jsonl"], "/nowhere/rows.jsonl"),
        (["train", "{recipe}", "memory.device=cuda"], "Set memory.device: cpu."),
        (["train", "{recipe}", "model.dtype=fp16"], "CPUs train in bf16 or fp32"),
        (["train", "{recipe}", "data.max_length=100000"], "256"),
        (["train", "{recipe}", "lora.targets=[q_prj]"], "q_proj"),
        (["train", "{recipe}", "train.batch=8", "train.micro_batch=3"], "does not divide"),
        (["train", "{recipe}", "output.dir={folder}"], "is not empty"),
        (["train", "{recipe}", "train.report_to=[trackio]"], "pip install trackio"),
        (["inspect", "builtin:huge"], "builtin:tiny"),
        (["inspect", "{folder}"], "config.json"),
    ],
)
def test_mistakes_get_one_message_and_exit_with_2(arguments, expected, recipe_file, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = [word.format(recipe=recipe_file, folder=recipe_file.parent) for word in arguments]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "error: " in shown and expected in shown.replace("\n", " ")
    assert "Traceback" not in shown


def test_a_diverged_run_exits_with_4(recipe_file, capsys):
    assert main(["train", str(recipe_file), "train.learning_rate=1e30", "train.max_steps=4"]) == 4
    assert "error: The loss became" in capsys.readouterr().err


def test_a_bad_row_is_named_before_the_model_loads(recipe_file, rows_file, capsys):
    with rows_file.open("a") as file:
        file.write('{"messages": []}\n')
    assert main(["train", str(recipe_file)]) == 2
    assert f"{rows_file}:41" in capsys.readouterr().err.replace("\n", "")
    assert not (recipe_file.parent / "out").exists()


def test_check_marks_what_is_trained(recipe_file, capsys):
    assert main(["check", str(recipe_file)]) == 0
    shown = capsys.readouterr().out
    assert "Ready to train" in shown and "p95" in shown and "duplicates" in shown and "<|im_end|>" in shown


def test_check_without_the_model(recipe_file, capsys):
    assert main(["check", str(recipe_file), "--data-only", "model=me/never-uploaded"]) == 0
    assert "characters" in capsys.readouterr().out


def test_inspect_counts_gpt2(capsys):
    assert main(["inspect", "openai-community/gpt2", "--r", "8", "--targets", "c_attn,c_proj", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lora_parameters"] == 811_008
    assert any("c_proj hits" in note for note in found["notes"])


def test_push_needs_an_adapter(tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/it"]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
