"""The first thing a newcomer runs, and the same on material that nobody here wrote. Minutes, not seconds: real training."""

import json
import os
import subprocess
import sys

import pytest


def train(recipe, folder, *overrides):
    command = [sys.executable, "-m", "qlora", "train", str(recipe), f"output.dir={folder}", "memory.device=cpu", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text()), done.stdout


def test_the_quickstart_teaches_what_the_base_could_not_do(root, tmp_path):
    report, shown = train(root / "recipes" / "quickstart.yaml", tmp_path / "run")
    assert report["before"]["exact_match"] < 0.05
    assert report["after"]["exact_match"] > 0.8
    assert report["after"]["num_answers"] == 64
    assert "before" in shown and "after" in shown and "peak memory" in shown and "report.md" in shown
    held_out = {sample["prompt"] for sample in report["samples"]}
    assert len(held_out) == 3


@pytest.mark.long
def test_a_real_pretrained_model_learns_real_maths_text(root, shared, tmp_path):
    """stories260K on GSM8K, 64 steps: a sketch of the same run, with batches twice as large, came from 5.10 to 2.74."""
    report, _ = train(
        root / "tests" / "recipes" / "stories-gsm8k.yaml", tmp_path / "run", "train.eval_every=0", "train.save_every=0",
        "data.validation=0.1", "train.batch=8",
        f"model={shared / 'models' / 'stories260K'}", f"data.path={shared / 'data' / 'gsm8k' / 'train.jsonl'}",
    )
    assert report["before"]["loss"] > 4.5
    assert report["after"]["loss"] < 2.74


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("korean_chatbot/ChatbotData.csv", "question_answer"),
        pytest.param("llamafactory_glaive/glaive_toolcall_en_demo.json", "sharegpt", marks=pytest.mark.long),
        pytest.param("llamafactory_glaive/identity.json", "alpaca", marks=pytest.mark.long),
        pytest.param("self_instruct/seed_tasks.jsonl", "alpaca", marks=pytest.mark.long),
        pytest.param("self_instruct/user_oriented_instructions.jsonl", "alpaca", marks=pytest.mark.long),
        pytest.param("fastchat/dummy_conversation.json", "sharegpt", marks=pytest.mark.long),
    ],
)
def test_formats_of_real_data_are_found_and_trained_on(path, format, shared, tmp_path):
    from qlora.recipe import build_recipe
    from qlora.training.run import train as run

    result = run(build_recipe(
        model=str(shared / "models" / "stories260K"), output=str(tmp_path / "run"), memory={"device": "cpu"},
        data={"path": str(shared / "data" / path), "max_rows": 60, "max_length": 256},
        train={"max_steps": 3, "batch": 4, "learning_rate": 1e-2, "sample_rows": 2},
    ))
    assert result.summary.data.format == format
    assert result.after["loss"] < result.before["loss"]
