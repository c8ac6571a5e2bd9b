"""The simulator on real architectures: shallow models tell the whole one exactly, and memory is monotone in what takes it."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from faults.parameters import in_long

from qlora.architecture import describe, find_config, select_targets
from qlora.hardware import device_from_card
from qlora.planning.search import Candidate
from qlora.precision import Precision
from qlora.training.simulator import Simulator, Workload
from qlora.units import GIB

MODELS = ("Qwen/Qwen3-0.6B", "openai-community/gpt2", "google/gemma-3-1b-it", "Qwen/Qwen3-30B-A3B")
BASE = Candidate(r=16, micro_batch=2, checkpointing=True, optimizer="adamw_8bit", max_length=512)


def simulator(model, device=None, **changes):
    config = find_config(model)
    architecture = describe(config)
    values = dict(
        config=config, architecture=architecture, selection=select_targets(architecture),
        precision=Precision("bf16", "bf16", False, "a test"), device=device or device_from_card(None, 8 * GIB),
        attention=architecture.attentions[0], batch=16, packed=False, ragged=True, dropout=0.0,
    )
    return Simulator(Workload(**{**values, **changes}))


@pytest.mark.parametrize("model", [*MODELS[:2], *in_long(*MODELS[2:])])
def test_two_shallow_models_tell_the_whole_one(model):
    found = simulator(model)
    whole = found.whole(BASE, generation_tokens=1024)
    assert found.tensors(BASE) == pytest.approx(max(whole.phases[phase] for phase in ("load", "train", "eval")), rel=1e-4)
    assert found.generation(BASE, 1024) == pytest.approx(whole.phases["generate"], rel=1e-3)
    sketch = found.sketch(BASE, 1024)
    assert sketch.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert sum(whole.parts.values()) == whole.peak_bytes
    assert whole.reserved_bytes >= whole.peak_bytes


@pytest.mark.parametrize("model", ("Qwen/Qwen3-0.6B", "openai-community/gpt2"))
@pytest.mark.parametrize(("field", "values"), [
    ("max_length", (64, 65, 511, 512, 1000, 1024)), ("micro_batch", (1, 2, 3, 8)), ("r", (8, 16, 17, 64)),
    ("checkpointing", (True, False)), ("optimizer", ("paged_adamw_8bit", "adamw_8bit", "adamw")),
])
def test_more_never_needs_less(model, field, values):
    found = simulator(model)
    needs = [found.tensors(replace(BASE, **{field: value})) for value in values]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]


def test_more_tokens_than_a_tile_of_the_loss_never_need_less():
    found = simulator("Qwen/Qwen3-0.6B")
    needs = [found.tensors(replace(BASE, micro_batch=1, max_length=length)) for length in (2048, 4095, 4097, 8193)]
    assert needs == sorted(needs)


def test_what_the_trainer_does_is_what_is_simulated():
    """Dropout, padding, packing and a plain precision change the need in the direction that they change the run."""
    plain = simulator("Qwen/Qwen3-0.6B").tensors(BASE)
    kept = replace(BASE, checkpointing=False)
    assert simulator("Qwen/Qwen3-0.6B", dropout=0.05).tensors(kept) > simulator("Qwen/Qwen3-0.6B").tensors(kept)
    assert simulator("Qwen/Qwen3-0.6B", ragged=False).tensors(BASE) < plain
    assert simulator("Qwen/Qwen3-0.6B", precision=Precision("fp32", "fp32", False, "a test")).tensors(BASE) > 1.3 * plain
    assert simulator("Qwen/Qwen3-0.6B", attention="eager").tensors(replace(BASE, max_length=1024)) > plain
    one = replace(BASE, micro_batch=1)
    assert simulator("Qwen/Qwen3-0.6B", packed=True).tensors(one) > simulator("Qwen/Qwen3-0.6B").tensors(one)


def test_windows_has_no_triton_and_needs_more_for_the_loss():
    card = device_from_card(None, 8 * GIB)
    found = simulator("Qwen/Qwen3-0.6B"), simulator("Qwen/Qwen3-0.6B", device=replace(card, windows=True))
    if find_spec("trl.kernels.chunked_logprob") is not None:  # before TRL 1.15 there were no kernels in Triton
        assert found[1].tensors(BASE) > found[0].tensors(BASE)
    whole = [each.whole(BASE, 1024) for each in found]
    assert whole[1].slack_bytes > whole[0].slack_bytes


def test_a_question_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    first, second = simulator("openai-community/gpt2"), simulator("openai-community/gpt2")
    assert first.tensors(BASE) == first.tensors(BASE) == second.tensors(BASE)
    assert (first.num_simulated, second.num_simulated) == (4, 0)
    for path in (tmp_path / "plans").iterdir():
        path.write_text("{", encoding="utf-8")  # a damaged entry is no entry
    third = simulator("openai-community/gpt2")
    assert third.tensors(BASE) == first.tensors(BASE)
    assert third.num_simulated == 4


def test_a_model_that_the_trainer_cannot_run_is_refused():
    from qlora.errors import ModelError

    with pytest.raises(ModelError, match="cannot be trained in 4 bits"):
        simulator("google/gemma-3n-E4B-it").tensors(BASE)
