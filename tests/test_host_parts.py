"""What lives in host memory: the input embedding and the adapters. Nothing that a model computes changes by it."""

import pytest
import torch
import truth
from test_engine_loss import FAMILIES, batch, bases, build, gradients  # noqa: F401

from qlora.architecture import describe, select_targets
from qlora.catalog.skeleton import find_layers
from qlora.engine.head import make_head
from qlora.engine.host_adapters import HostAdapters
from qlora.engine.host_embedding import embed_on_host
from qlora.engine.loss import LanguageModelLoss
from qlora.model.adapt import add_adapters
from qlora.model.exact import make_exact
from qlora.model.meta import build_base_on_meta
from qlora.planning.trace import Recorder

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# --- the embedding -----------------------------------------------------------------------------------------------------


def states(model, inputs):
    """Logits, and the gradients of their sum of squares."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logits.float().square().sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_on_the_host_changes_no_bit(bases, family, compute):  # noqa: F811
    inputs = batch()
    model = build(bases(family), compute)
    expected, slopes = states(model, inputs)
    for table in (None, model.get_input_embeddings().weight.data.clone()):
        model = build(bases(family), compute)
        embed_on_host(model, table, CPU)
        found, found_slopes = states(model, inputs)
        assert torch.equal(found, expected) and all(torch.equal(found_slopes[name], slopes[name]) for name in slopes)
        assert table is None or model.get_input_embeddings().weight.data_ptr() == table.data_ptr()


def test_a_table_in_a_file_is_used_where_it_lies(bases, tmp_path):  # noqa: F811
    """Mapped and read-only."""
    inputs, model = batch(), build(bases("gemma3"), "bf16")
    expected, _ = states(model, inputs)
    weight = model.get_input_embeddings().weight.data
    (tmp_path / "table").write_bytes(weight.view(torch.uint8).numpy().tobytes())
    table = torch.from_file(str(tmp_path / "table"), shared=False, size=weight.numel(), dtype=torch.bfloat16).view(weight.shape)
    embed_on_host(model, table, CPU)
    assert torch.equal(states(model, inputs)[0], expected)


def test_a_wrong_table_is_refused(bases):  # noqa: F811
    model = build(bases("llama"))
    with pytest.raises(AssertionError, match="a table of"):
        embed_on_host(model, torch.zeros(511, 64), CPU)


def test_other_hooks_find_the_rows_on_the_device(bases):  # noqa: F811
    """Also those that were there before: what makes the output ask for gradients would else have one sent to the host."""
    model, seen = build(bases("gemma3")), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: seen.append((args[0].device.type, output.device.type)))
    embed_on_host(model, None, "meta")  # stands for a device that is not the host
    assert embedding(torch.arange(5)[None]).shape == (1, 5, 64)
    assert seen == [("cpu", "meta")] and embedding.weight.device.type == embedding.embed_scale.device.type == "cpu"


def small_on_meta(family):
    from transformers import AutoConfig

    kind, sizes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**sizes, "vocab_size": 50_000})
    base = build_base_on_meta(config, precision=truth.PRECISIONS["bf16"], attention="eager")
    return add_adapters(base, select_targets(describe(config)), r=4, alpha=4, seed=0, dtype=torch.bfloat16)


@pytest.mark.parametrize("family, format", [("llama", "streamed"), ("llama", "nf4"), ("gemma3", "streamed"), ("gpt2", "int8")])
def test_on_meta_tables_are_no_memory_of_the_device(family, format):
    """A step through embedding, backbone, head and loss, as a planner records it: nothing in it is as large as the table."""
    model = small_on_meta(family)
    table = torch.empty(50_000, 64, dtype=torch.bfloat16, device="meta")
    embed_on_host(model, table, "meta")
    head = make_head(model, format, "meta", table)
    loss = LanguageModelLoss(model, head, 2**20)
    recorder = Recorder(ragged=True)
    for tensor in head.tensors():
        recorder.track(tensor, "head")
    inputs = {key: torch.empty_like(value, device="meta") for key, value in batch().items()}
    with recorder:
        loss(model, inputs, torch.empty((), dtype=torch.long, device="meta")).backward()
    events = [event for event in recorder.trace() if event.size_bytes > 0]
    assert any("embedding" in event.op for event in events)
    assert max(event.size_bytes for event in events if event.part != "head") < 2**20
    assert sum(event.size_bytes for event in events if event.part == "head") == sum(t.nbytes for t in head.tensors())


# --- the adapters ------------------------------------------------------------------------------------------------------


def layers_of(model):
    base = model.get_base_model()
    return list(base.get_submodule(find_layers(base.config, dict(base.named_modules()))))


class Visits:
    """Enters a layer before its forward pass and leaves it after its backward pass; between the two all layers are entered,
    which a schedule would not do, but gradients are those of one visit a layer.
    """

    def __init__(self, model):
        self.layers = layers_of(model)
        self.host = HostAdapters(self.layers, CPU)

    def __enter__(self):
        for i in range(len(self.layers)):
            self.host.enter(i, train=True)
        return self.host

    def __exit__(self, *_):
        for i in reversed(range(len(self.layers))):
            self.host.leave(i)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("exact", [False, True], ids=["", "row by row"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steps_are_the_same_to_the_last_bit(bases, family, exact):  # noqa: F811
    """Three optimizer steps of two micro-batches: gradients and weights."""
    found = []
    for on_host in (False, True):
        model = build(bases(family))
        if exact:
            make_exact(model)
        visits = Visits(model) if on_host else None
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            if visits:
                visits.__enter__()
            for inputs in (batch(), batch(2, 13)):
                model(**inputs).loss.backward()
            if visits:
                visits.__exit__()
            slopes = {name: p.grad.clone() for name, p in trained(model).items()}
            torch.nn.utils.clip_grad_norm_(trained(model).values(), 0.5)
            optimizer.step()
        found.append((slopes, {name: p.detach().clone() for name, p in trained(model).items()}))
    for plain, hosted in zip(*found, strict=True):
        assert plain.keys() == hosted.keys() and len(plain) > 10
        assert all(torch.equal(plain[name], hosted[name]) for name in plain)


def test_between_visits_everybody_sees_the_hosts_parameters(bases):  # noqa: F811
    model = build(bases("llama"))
    before, state = dict(model.named_parameters()), list(model.state_dict())
    values = {name: p.detach().clone() for name, p in trained(model).items()}
    visits = Visits(model)
    with visits:
        inside = trained(model)
        assert list(dict(model.named_parameters())) == list(before)
        assert all(inside[name] is not before[name] and torch.equal(inside[name], values[name]) for name in inside)
        model(**batch()).loss.backward()
        assert all(before[name].grad is None for name in inside)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == state
    assert all(p.grad.device.type == "cpu" and torch.equal(p.detach(), values[name]) for name, p in trained(model).items())


def test_visits_add_up_and_those_without_training_leave_nothing(bases):  # noqa: F811
    model = build(bases("llama"))
    visits = Visits(model)
    with visits:
        model(**batch()).loss.backward()
    once = {name: p.grad.clone() for name, p in trained(model).items()}
    with visits:
        model(**batch()).loss.backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in trained(model).items())
    visits.host.enter(0, train=False)
    assert not any(p.requires_grad for p in visits.layers[0].parameters())
    visits.host.leave(0)
    assert all(torch.equal(p.grad, 2 * once[name]) and p.requires_grad for name, p in trained(model).items())


def test_an_adapter_that_was_not_used_has_no_gradient(bases):  # noqa: F811
    """Of a mixture's experts some see no token; the optimizer leaves those alone, and a zero would move them."""
    model = build(bases("llama"))
    visits = Visits(model)
    with visits:
        layers_of(model)[0].mlp(torch.ones(1, 3, 64)).sum().backward()
    assert all((p.grad is not None) == (".layers.0.mlp." in name) for name, p in trained(model).items())


def test_parameters_that_were_given_other_memory_are_found(bases):  # noqa: F811
    """Trainers change the type of adapters, and loaders their memory, without asking."""
    model = build(bases("llama"))
    visits = Visits(model)
    for number, parameter in enumerate(trained(model).values()):
        parameter.data = torch.full_like(parameter.data, number + 1.0, dtype=torch.bfloat16)
    with visits:
        for number, parameter in enumerate(trained(model).values()):
            assert parameter.dtype == torch.bfloat16 and (parameter == number + 1).all()
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    for parameter in trained(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with visits:
        for number, parameter in enumerate(trained(model).values()):
            assert (parameter == number).all()


def test_visits_that_are_abandoned(bases):  # noqa: F811
    model = build(bases("llama"))
    before, visits = dict(model.named_parameters()), Visits(model)
    visits.__enter__()
    model(**batch()).loss.backward()
    with pytest.raises(AssertionError, match="visited already"):
        visits.host.enter(0, train=True)
    visits.host.abandon()
    assert all(parameter is before[name] and parameter.grad is None for name, parameter in model.named_parameters())
    with pytest.raises(AssertionError, match="not being visited"):
        visits.host.leave(0)
    with visits:
        pass


def test_adapters_are_saved_as_ever(bases, tmp_path):  # noqa: F811
    from safetensors.torch import load_file

    model = build(bases("llama"))
    model.save_pretrained(tmp_path / "before")
    visits = Visits(model)
    with visits:
        pass
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_on_meta_a_visit_takes_one_layers_adapters():
    """And leaves nothing: on a device the parameters, their gradients and the optimizer's state are the host's."""
    model = small_on_meta("llama")
    layers = layers_of(model)
    size = sum(p.nbytes for p in layers[0].parameters() if p.requires_grad)
    recorder = Recorder()
    with recorder:
        host = HostAdapters(layers, "meta")
        assert not recorder.events
        for i, layer in enumerate(layers):
            host.enter(i, train=True)
            entered = sum(event.size_bytes for event in recorder.events)
            assert size <= entered < size + 14 * 512 + 4096
            leaf = layer.mlp.up_proj.lora_A["default"].weight
            (leaf * 1.0).sum().backward()
            assert leaf.grad is not None
            del leaf
            host.leave(i)
            assert sum(event.size_bytes for event in recorder.events) == 0
        assert all(p.grad is None for p in model.parameters())
