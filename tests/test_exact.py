"""A micro-batch in parts gives the very gradients of the whole: on one thread of a CPU, in fp32, to the last bit."""

import pytest
import torch
import truth
from faults.parameters import in_long
from test_cpu_truth import assert_close, rehearsed
from torch.nn import functional as F

from qlora.architecture import describe, find_config, select_targets
from qlora.model.adapt import add_adapters
from qlora.model.build import build_base
from qlora.model.exact import RowwiseLinear, make_exact
from qlora.precision import Precision
from qlora.training.recovery import split_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

FP32 = Precision("fp32", "fp32", False, "a test")


def build(folder, *, r=8, dropout=0.0, exact=True):
    """A 4-bit base in fp32 compute with adapters that have been trained a little: B is not zero."""
    config = find_config(str(folder))
    base = build_base(str(folder), config, device=truth.CPU, precision=FP32, attention="sdpa")
    model = add_adapters(base, select_targets(describe(config)), r=r, alpha=r, dropout=dropout, seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    if exact:
        make_exact(model)
    return model.train()


@pytest.fixture(scope="session", params=["untrained", "260K"])
def folder(request):
    """Both have fewer heads of keys than of queries."""
    if request.param == "untrained":
        return request.getfixturevalue("small_model")
    return request.getfixturevalue("shared") / "models" / "stories260K"


def batch(*lengths):
    """A padded batch as the collator makes it."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def learn(model, parts, *, keep=False):
    """The adapters' gradients after these parts of a step."""
    if not keep:
        model.zero_grad()
    for part in parts:
        labels = part["labels"][:, 1:].flatten()
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits
        (F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum") / 77).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def num_equal(first, second):
    return sum(torch.equal(first[name], second[name]) for name in first)


RAGGED, EVEN, ODD = batch(40, 31, 12, 40), batch(37, 37, 37, 37), batch(101, 4, 77, 100, 53)


@pytest.mark.parametrize("whole", [RAGGED, EVEN, ODD], ids=["ragged", "even", "five rows"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_give_the_gradients_of_the_whole(folder, whole, checkpointing):
    model = build(folder)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = learn(model, [whole])
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for num_parts in (2, 3, len(whole["input_ids"])):
        assert num_equal(learn(model, split_inputs(whole, num_parts)), expected) == len(expected), num_parts


def test_parts_are_added_to_what_is_there_as_the_whole_is(folder):
    """The second micro-batch of a step."""
    model = build(folder)
    expected = learn(model, [EVEN, RAGGED])
    assert num_equal(learn(model, [*split_inputs(EVEN, 2), *split_inputs(RAGGED, 4)]), expected) == len(expected)
    learn(model, [EVEN])
    assert num_equal(learn(model, split_inputs(RAGGED, 2), keep=True), expected) == len(expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_are_those_of_plain_layers(folder, dropout, checkpointing):
    """To rounding; random numbers are drawn as before."""
    found = []
    for exact in (False, True):
        model = build(folder, dropout=dropout, exact=exact)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        found.append(learn(model, [RAGGED]))
    plain, exact = found
    assert plain.keys() == exact.keys()
    for name in plain:
        assert torch.allclose(exact[name], plain[name], rtol=1e-4, atol=1e-5 * float(plain[name].abs().max())), name


def test_plain_layers_would_not_do(folder):
    """What all of this is for; when this fails, torch has become exact by itself."""
    model = build(folder, exact=False)
    expected = learn(model, [EVEN])
    assert num_equal(learn(model, split_inputs(EVEN, 2)), expected) < len(expected)


def test_nothing_else_changes(small_model):
    """Names, weights, modes and random numbers; the model computes the same."""
    model = build(small_model, exact=False).eval()
    weights, logits = dict(model.named_parameters()), model(**RAGGED).logits
    names, state = list(model.state_dict()), torch.get_rng_state()
    make_exact(model)
    assert list(model.state_dict()) == names and torch.equal(torch.get_rng_state(), state)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    rowwise = [module for module in model.modules() if isinstance(module, RowwiseLinear)]
    assert len(rowwise) == 2 * 2 * 7 and not any(module.training for module in rowwise)
    assert torch.equal(model(**RAGGED).logits, logits)


@pytest.mark.parametrize("shape", [(3, 5, 6), (5, 6), (2, 3, 5, 6)])
def test_inputs_of_any_shape(shape):
    layer, plain = RowwiseLinear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)
    plain.weight.data.copy_(layer.weight.data)
    inputs = torch.randn(shape)
    found = []
    for each in (layer, plain):
        x = inputs.clone().requires_grad_()
        out = each(x)
        out.sin().sum().backward()
        found.append((out, x.grad, each.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_frozen_layer_gets_no_gradient():
    layer = RowwiseLinear(6, 4, bias=False).requires_grad_(False)
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


@pytest.mark.parametrize("cell", [
    truth.Cell("qwen3", micro_batch=3, length=300, compute="fp32", ragged=True),
    *in_long(truth.Cell("llama", micro_batch=3, length=300, compute="fp32", checkpointing=False, accumulation=2)),
], ids=str)
def test_a_rehearsal_knows_what_it_takes(cell, tmp_path):
    true = truth.measure(cell, tmp_path, after=("eval",)).peaks
    found = rehearsed(cell, ("train", "eval"))
    assert_close(found["train"], true["train"])
    assert_close(found["eval"], true["eval"])
