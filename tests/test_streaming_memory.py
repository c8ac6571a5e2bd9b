"""What the planner says of runs that use the engine, held against what the trial of such runs takes on a CPU."""

import json
from dataclasses import replace

import pytest

from qlora.errors import OutputError
from qlora.planning.plan import Decision
from qlora.progress import Progress
from qlora.recipe import build_recipe
from qlora.training.building import build_model
from qlora.training.cpu_memory import TensorMeter
from qlora.training.meter import planned_phases
from qlora.training.probe import probe
from qlora.training.recovery import Ladder
from qlora.training.setup import prepare

LEAST = {"streaming": True, "resident_layers": 0, "fused_lora": True, "loss_chunk": "1MiB", "mlp_tile": 64, "embedding_device": "host",
         "head_format": "streamed"}
CASES = {
    "some layers": {"streaming": True, "resident_layers": 3}, "from RAM": {"streaming": True, "resident_layers": 0, "stream_from": "ram"},
    "everything": LEAST, "two a visit": {"streaming": True, "resident_layers": 0, "visit_micro_batches": 2, "dequantise_once": False},
    "adapters away": {"streaming": True, "resident_layers": 2, "offload_adapters": True, "dequantise_once": True},
    "fused": {"fused_lora": True}, "int8 head": {"head_format": "int8"},
}
QUICK = ("everything",)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Eight layers of a size at which the Python objects of a run do not count."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora.model.build import load_tokenizer, locate_base

    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(locate_base("builtin:tiny"))
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "the cat sat on the mat and the dog ran to the red house " * (1 + i % 9)}) + "\n"
                            for i in range(40)))
    return path


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in CASES])
def test_a_plan_is_true(model, rows, tmp_path, monkeypatch, case):
    """Training, the phase that is the highest: never under what was measured by more than the objects around tensors, nor far over."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    recipe = build_recipe(
        model={"base": str(model), "dtype": "bf16"}, data={"path": str(rows), "validation": 0.2, "train_on": "all"}, lora={"r": 16},
        train={"max_steps": 1, "micro_batch": 2, "accumulation": 4, "optimizer": "adamw", "sample_rows": 0},
        memory={"device": "cpu", "checkpointing": True, **CASES[case]}, output=str(tmp_path / "run"),
    )
    setup, meter = prepare(recipe), TensorMeter()
    (tmp_path / "run").mkdir()
    with meter.watching():
        built, engine = build_model(setup, Progress())
        probe(setup, built, engine, Ladder(setup.plan), tmp_path / "run", meter, lambda line: None)
    engine.close()
    planned = planned_phases(setup.plan, meter.allocated)
    assert meter.allocated["train"] <= 1.005 * planned["train"], (planned, meter.allocated)
    assert planned["train"] <= 1.05 * meter.allocated["train"], (planned, meter.allocated)
    assert meter.allocated["eval"] <= 1.005 * planned["eval"], (planned, meter.allocated)


@pytest.mark.long
def test_a_base_that_cannot_be_kept_is_loaded_all_the_same(model, rows, tmp_path, monkeypatch):
    """Unless a person has asked for it, or its layers are to be streamed."""
    notes = []

    class Listener(Progress):
        def note(self, text):
            notes.append(text)

    def setup_with(source, **memory):
        recipe = build_recipe(model=str(model), data={"path": str(rows), "validation": 0, "max_length": 32}, output=str(tmp_path),
                              train={"max_steps": 1, "sample_rows": 0}, memory={"device": "cpu", **memory})
        setup = prepare(recipe)
        decisions = {**setup.plan.decisions, "memory.cache_base": Decision(True, source, "")}
        return replace(setup, plan=replace(setup.plan, decisions=decisions))

    def no_room(*_, **__):
        raise OutputError("There is no room for it.", "Make some.")

    monkeypatch.setattr("qlora.engine.quantise.open_or_build", no_room)
    built, engine = build_model(setup_with("derived"), Listener())
    assert engine.store is None and built.num_parameters() > 0 and "no room" in notes[-1]
    for source, memory in (("given", {}), ("derived", {"streaming": True})):
        with pytest.raises(OutputError, match="no room"):
            build_model(setup_with(source, **memory), Listener())
