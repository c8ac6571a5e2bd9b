"""The whole run on a small real model: quantiser, adapters, TRL, evaluation, files."""

import json
import stat

import pytest
import torch

from qlora.errors import DivergedError, OutputError
from qlora.recipe import build_recipe
from qlora.training.run import train


@pytest.fixture
def recipe(small_model, rows_file, tmp_path):
    """A function that makes a short run's recipe; keyword arguments are sections."""

    def make(folder="run", **sections):
        settings = {"epochs": 1, "max_steps": 4, "batch": 8, "learning_rate": 5e-3, "sample_rows": 4, **sections.pop("train", {})}
        data = {"path": str(rows_file), "validation": 0.2, **sections.pop("data", {})}
        return build_recipe(
            model={"base": str(small_model), **sections.pop("model", {})}, data=data, train=settings,
            memory={"device": "cpu"}, output=str(tmp_path / folder), **sections,
        )

    return make


def adapter_weights(result):
    from safetensors.torch import load_file

    return load_file(result.adapter / "adapter_model.safetensors")


def losses(result):
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_leaves_what_the_design_names(recipe):
    result = train(recipe())
    names = {path.name for path in result.folder.iterdir()}
    assert {"resolved.json", "plan.json", "metrics.jsonl", "checkpoints", "adapter", "report.md", "report.json", "plots"} <= names
    assert {"loss.png", "learning_rate.png", "grad_norm.png", "lengths.png"} <= {p.name for p in (result.folder / "plots").iterdir()}
    resolved = json.loads((result.folder / "resolved.json").read_text())
    assert "auto" not in [d["value"] for d in resolved["settings"].values()]
    assert all(d["reason"] for d in resolved["settings"].values())
    assert result.after["loss"] < result.before["loss"]
    assert 0 <= result.after["exact_match"] <= 1


def test_files_can_be_read_by_others(recipe):
    result = train(recipe())
    for path in result.adapter.rglob("*"):
        assert path.stat().st_mode & stat.S_IROTH, path


def test_adapters_moved_and_the_base_did_not(recipe, small_model):
    result = train(recipe())
    weights = adapter_weights(result)
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 2 * 7  # seven projections in each of two layers; B starts at zero
    assert not [name for name in weights if "lora_" not in name]


def test_plain_peft_loads_the_adapter_with_equal_logits(recipe, small_model):
    """What anybody does with the folder gives bit for bit what the run saw."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from qlora import _compat
    from qlora.training.run import build_model
    from qlora.training.setup import prepare
    from qlora.progress import Progress

    result = train(recipe())
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(
        small_model, quantization_config=quantisation, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    _compat.use_plain_cpu_kernels(base)
    theirs = PeftModel.from_pretrained(base, result.adapter, autocast_adapter_dtype=False).eval()
    ours = build_model(prepare(recipe("other")), Progress())[0].eval()
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(ours, adapter_weights(result))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert AutoTokenizer.from_pretrained(result.adapter).chat_template


def test_accumulation_does_not_change_the_step(recipe):
    """1 x 8 equals 8 x 1: the loss is a mean over the step's tokens, however the rows are split. In fp32, to rounding."""
    common = dict(model={"dtype": "fp32"})
    whole = train(recipe("whole", train={"micro_batch": 8, "accumulation": 1, "batch": "auto"}, **common))
    split = train(recipe("split", train={"micro_batch": 1, "accumulation": 8, "batch": "auto"}, **common))
    assert losses(whole) == pytest.approx(losses(split), rel=2e-5)
    a, b = adapter_weights(whole), adapter_weights(split)
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=2e-5) for name in a)


def test_a_partial_last_window_weighs_its_tokens(recipe):
    """32 rows in windows of 5 leave one of 2; its gradient is that of its own tokens, not two fifths of it."""
    common = dict(model={"dtype": "fp32"})
    split = {"micro_batch": 1, "accumulation": 5, "batch": "auto", "max_steps": 7, "learning_rate": 1e-9}
    whole = {"micro_batch": 5, "accumulation": 1, "batch": "auto", "max_steps": 7, "learning_rate": 1e-9}
    a, b = (train(recipe(name, train=s, **common)) for name, s in (("split", split), ("whole", whole)))
    norms = [[json.loads(line) for line in (r.folder / "metrics.jsonl").read_text().splitlines()] for r in (a, b)]
    last = [[row["grad_norm"] for row in rows if "grad_norm" in row][-1] for rows in norms]
    assert last[0] == pytest.approx(last[1], rel=1e-3)


@pytest.mark.long
def test_the_same_seed_gives_the_same_run(recipe):
    first, second = train(recipe("first")), train(recipe("second"))
    assert losses(first) == losses(second)
    a, b = adapter_weights(first), adapter_weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_packed_rows_do_not_see_each_other(recipe):
    """The first loss of a packed run over all rows equals that of the same rows one by one."""
    everything = {"max_steps": 1, "learning_rate": 1e-9, "sample_rows": 0}
    common = dict(model={"dtype": "fp32"})
    alone = train(recipe("alone", train={**everything, "batch": 32, "micro_batch": 32}, **common))
    packed = train(recipe("packed", data={"packing": True, "max_length": 200}, train={**everything, "batch": 32, "micro_batch": 1}, **common))
    assert losses(packed)[0] == pytest.approx(losses(alone)[0], rel=1e-5)


def test_a_non_finite_loss_stops_before_it_spoils_the_weights(recipe, tmp_path):
    with pytest.raises(DivergedError) as caught:
        train(recipe(train={"learning_rate": 1e30}))
    assert caught.value.exit_code == 4 and "step" in str(caught.value) and "learning_rate" in str(caught.value)
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "report.md").exists()
    kept = tmp_path / "run" / "checkpoints" / "last-good" / "adapter_model.safetensors"
    from safetensors.torch import load_file

    assert all(tensor.isfinite().all() for tensor in load_file(kept).values())


def test_a_non_finite_gradient_stops_too(recipe, monkeypatch):
    """The loss may be finite while the gradient is not."""
    from qlora.training.trainer import AdapterTrainer

    plain = AdapterTrainer.compute_loss

    def with_bad_gradient(self, model, inputs, *args, **kwargs):
        loss = plain(self, model, inputs, *args, **kwargs)
        if model.training and self.state.global_step == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", with_bad_gradient)
    with pytest.raises(DivergedError, match="gradient became non-finite in step 3 of 4"):
        train(recipe())


def test_nothing_is_overwritten(recipe):
    train(recipe())
    with pytest.raises(OutputError, match="not empty"):
        train(recipe())


def test_random_weights_take_the_normal_path(recipe, small_model):
    result = train(recipe(model={"weights": "random"}, train={"max_steps": 1}))
    assert len(losses(result)) == 1


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_adapter_that_is_kept_is_the_one_that_was_asked_for(recipe, keep):
    """A rate that is too high makes the held-out loss rise again, so that best and last differ."""
    result = train(recipe(train={
        "learning_rate": 0.2, "schedule": "constant", "max_steps": 10, "eval_every": 2, "save_every": 2, "keep": keep, "sample_rows": 0,
    }))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    found = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert min(found) < found[-1] * 0.999
    assert result.after["loss"] == pytest.approx(min(found) if keep == "best" else found[-1], rel=1e-3)
