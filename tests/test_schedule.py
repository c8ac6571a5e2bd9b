"""The schedule and what it stands on, part by part: layers arrive, hidden states wait, and the numbers are the plain model's."""

from __future__ import annotations

import itertools
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from qlora.architecture import describe
from qlora.catalog import catalog_config, catalog_ids
from qlora.engine import boundaries, sources
from qlora.engine.arena import Binding, fill, layer_layout, places_of
from qlora.engine.boundaries import OnDevice, OnHost
from qlora.engine.schedule import Schedule
from qlora.engine.sources import make_source
from qlora.engine.stream import AllThere, Stream
from qlora.errors import ModelError, StoreError

pytestmark = pytest.mark.usefixtures("one_thread")

# --- layers arrive ---------------------------------------------------------------------------------------------------------


def make_layers(count, width=8):
    """Frozen layers, each with its number in all its weights, and what reads them into blocks of host memory."""
    layers = [torch.nn.Linear(width, width + number, bias=number % 2 == 0).requires_grad_(False) for number in range(count)]
    layouts = [layer_layout(layer) for layer in layers]
    kept = []
    for number, (layer, layout) in enumerate(zip(layers, layouts, strict=True)):
        block = torch.empty(layout.size_bytes, dtype=torch.uint8)
        fill(layout, block, {name: torch.full_like(tensor, number) for name, tensor in layer.named_parameters()})
        kept.append(block)
    return layers, layouts, lambda number, block: block.copy_(kept[number])


def make_stream(count, *, resident=(), num_slots=2, stream_from="ram", read=None):
    layers, layouts, plain_read = make_layers(count)
    streamed = [number for number in range(count) if number not in resident]
    source = make_source(read and partial(read, plain_read) or plain_read, layouts, streamed, device="cpu", stream_from=stream_from)
    return layers, Stream(layers, layouts, resident=resident, read=plain_read, source=source, device="cpu", num_slots=num_slots)


def fewest_loads(order, num_slots):
    """The fewest with which layers can be visited in this order, by trying everything."""
    states = {frozenset(): 0}
    for number in order:
        after = {}
        for held, loads in states.items():
            if number in held:
                choices = [(held, loads)]
            elif len(held) < num_slots:
                choices = [(held | {number}, loads + 1)]
            else:
                choices = [(held - {gone} | {number}, loads + 1) for gone in held]
            for state, count in choices:
                after[state] = min(count, after.get(state, count))
        states = after
    return min(states.values())


@pytest.mark.parametrize("stream_from", ["ram", "disk"])
@pytest.mark.parametrize(("count", "resident"), [(5, ()), (5, (1, 3)), (4, (0, 1, 2)), (3, (0, 1, 2)), (1, ())])
def test_each_layer_has_its_own_weights_while_it_is_visited_and_none_after(stream_from, count, resident):
    layers, stream = make_stream(count, resident=resident, stream_from=stream_from)
    order = [*range(count), *reversed(range(count))]
    for number in itertools.chain(*(stream.walk(order) for _ in range(3))):
        assert all((parameter == number).all() and parameter.numel() for parameter in layers[number].parameters())
        others = [layer for other, layer in enumerate(layers) if other != number and other not in resident]
        assert not any(parameter.numel() for layer in others for parameter in layer.parameters())
    assert not any(p.numel() for number, layer in enumerate(layers) if number not in resident for p in layer.parameters())
    stream.close()


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_step_loads_twice_less_the_turns(count, num_slots):
    _, stream = make_stream(count, num_slots=num_slots)
    kept, loads = min(count, num_slots), []
    for _ in range(4):
        list(stream.walk([*range(count), *reversed(range(count))]))
        loads.append(sum(stream.num_loads))
    assert loads == [2 * count - kept + 2 * (count - kept) * step for step in range(4)]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("resident", [(), (0,), (2, 5), (1, 3, 5), (0, 1, 2, 3, 4)])
def test_no_choice_of_what_gives_way_would_load_less(num_slots, resident):
    """In the order of a step. What is brought at its end is for the next."""
    order = [*range(6), *reversed(range(6))]
    _, stream = make_stream(6, num_slots=num_slots, resident=resident)
    for _ in range(3):
        list(stream.walk(order))
    streamed = [number for number in order if number not in resident]
    assert sum(stream.num_loads) == fewest_loads(streamed * 3, min(num_slots, len(streamed) // 2))


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_no_more_is_loaded_than_it_takes_to_be_ahead(seed):
    """Of two slots one is being used while the other is filled, which leaves no choice; of one there is none."""
    generator = torch.Generator().manual_seed(seed)
    order, num_slots = torch.randint(3 + seed % 3, (9,), generator=generator).tolist(), 1 + seed % 2
    _, stream = make_stream(6, num_slots=num_slots)
    list(stream.walk(order))
    expected, held, last = 0, [], None
    for number in [*order, *(number for number in order if number != order[-1])][: len(order) + num_slots - 1]:
        if number not in held:
            held = [each for each in held if num_slots == 2 and each == last] + [number]
            expected += 1
        last = number
    assert sum(stream.num_loads) == expected


def test_the_next_layer_is_on_its_way_while_one_is_visited():
    """It is read in another thread, before anybody asks for it."""
    begun, threads = threading.Event(), []

    def read(plain, number, block):
        threads.append((number, threading.current_thread() is threading.main_thread()))
        if number == 1:
            begun.set()
        plain(number, block)

    _, stream = make_stream(3, stream_from="disk", read=read)
    visits = stream.walk(range(3))
    assert next(visits) == 0
    assert begun.wait(10)
    assert not any(on_main for _, on_main in threads)
    visits.close()
    stream.close()


def failing(broken):
    """Reading these fails, in the thread that reads ahead."""
    def read(plain, number, block):
        if number in broken:
            raise StoreError(f"layer {number} cannot be read.", "Look at the disk.")
        plain(number, block)

    return read


def test_an_error_of_reading_comes_where_the_layer_is_visited():
    """And what was not read is never taken for the layer."""
    broken, seen = {2}, []
    layers, stream = make_stream(4, stream_from="disk", read=failing(broken))
    with pytest.raises(StoreError, match="layer 2"):
        for number in stream.walk(range(4)):
            seen.append(number)
    assert seen == [0, 1]
    broken.clear()
    for number in stream.walk([2, 3, 1]):
        assert (layers[number].weight == number).all()
    stream.close()


def test_an_error_of_a_layer_that_is_not_wanted_any_more_comes_once():
    """It was on its way when the order changed, and the slot is good again for others."""
    layers, stream = make_stream(5, stream_from="disk", read=failing({2}))
    visits = stream.walk([1, 2])
    next(visits)
    visits.close()
    with pytest.raises(StoreError, match="layer 2"):
        list(stream.walk([3, 4, 3]))
    for number in stream.walk([3, 4, 0, 1, 3]):
        assert (layers[number].weight == number).all()
    stream.close()


def test_a_layer_that_is_not_visited_cannot_compute_and_its_model_can_still_be_saved():
    """`state_dict()`, which loading an adapter calls, asks 4-bit weights for a number of theirs."""
    import bitsandbytes as bnb

    layer = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True))
    layer.to("cpu").requires_grad_(False)
    inputs = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    expected = layer(inputs)
    layout = layer_layout(layer)
    block = torch.empty(layout.size_bytes, dtype=torch.uint8)
    fill(layout, block, {place.name: place.tensor for place in places_of(layer)})
    binding = Binding(layer, layout)
    binding.release("cpu")
    layer.state_dict()
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        layer(inputs)
    binding.bind(block)
    assert torch.equal(layer(inputs), expected)


def test_layers_in_ram_are_read_once_and_counted(monkeypatch):
    told, numbers = [], []
    layers, layouts, plain = make_layers(4)

    def read(number, block):
        numbers.append(number)
        plain(number, block)

    source = make_source(read, layouts, [0, 2], device="cpu", stream_from="ram", loading=lambda *state: told.append(state))
    assert numbers == [0, 2] and told == [(1, 2), (2, 2)]
    assert isinstance(source, sources.RamSource) and source.memory.num_pageable_bytes == 0
    slot = torch.empty(layouts[2].size_bytes, dtype=torch.uint8)
    for _ in range(3):
        source.fetch(2, slot)()
    assert numbers == [0, 2]
    assert all((view == 2).all() for view in layouts[2].views(slot).values())
    source.close()


# --- hidden states wait ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(boundaries, "_CHUNK_BYTES", 3 * 4096)


@pytest.mark.parametrize("kind", [OnDevice, partial(OnHost, "cpu")], ids=["device", "host"])
def test_hidden_states_come_back_as_they_went(kind, small_chunks):
    """In any order, looked at as often as one likes, announced or not, whatever was kept in between."""
    kept, held = kind(), {}
    generator = torch.Generator().manual_seed(0)
    for turn in range(200):
        choice = int(torch.randint(4, (), generator=generator))
        if choice < 2 or not held:
            tensor = torch.randn(1 + turn % 3, 1 + turn * 7 % 300, 4, generator=generator)
            held[turn] = tensor.to([torch.float32, torch.bfloat16][turn % 2])
            kept.keep(turn, held[turn].clone())
            continue
        key = list(held)[int(torch.randint(len(held), (), generator=generator))]
        if choice == 2:
            kept.soon(key)
            found, expected = kept.look(key), held[key]
        else:
            found, expected = kept.take(key), held.pop(key)
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    for key in list(held):
        assert torch.equal(kept.take(key), held.pop(key))


def test_what_waits_in_host_memory_is_a_copy(small_chunks):
    """The device's memory may be written to once the next ones have been kept."""
    kept, tensors = OnHost("cpu"), [torch.full((5,), float(number)) for number in range(4)]
    for number, tensor in enumerate(tensors):
        kept.keep(number, tensor)
    tensors[0].fill_(-1)
    assert (kept.look(0) == 0).all() and (kept.take(0) == 0).all()
    assert (kept.take(3) == 3).all()


def test_room_is_used_again(small_chunks, monkeypatch):
    """Steps of ever different lengths take no more of it than the largest."""
    made, plain = [], boundaries.HostMemory.block
    monkeypatch.setattr(boundaries.HostMemory, "block", lambda self, size: made.append(size) or plain(self, size))
    kept = OnHost("cpu")

    def step(length):
        for number in range(6):
            kept.keep(number, torch.zeros(length, 1024))
        for number in reversed(range(6)):
            kept.take(number)
            kept.keep(("gradient", number), torch.zeros(length, 1024))  # in the place that was given back
            kept.take(("gradient", number))

    step(4)
    largest = sum(made)
    assert largest >= 6 * 4 * 4096
    for length in (1, 3, 2, 4, 1, 4):
        step(length)
    assert sum(made) == largest


def test_after_a_step_that_ended_early_nothing_is_held(small_chunks):
    kept = OnHost("cpu")
    kept.keep("a", torch.zeros(3))
    kept.keep("b", torch.ones(3))
    kept.soon("a")
    kept.clear()
    for key in "ab":
        with pytest.raises(KeyError):
            kept.look(key)
    kept.keep("a", torch.full((3,), 2.0))
    kept.keep("b", torch.full((3,), 3.0))
    assert (kept.take("a") == 2).all() and (kept.take("b") == 3).all()
    kept.close()


# --- the numbers are the plain model's -------------------------------------------------------------------------------------

# What makes a real config small: its own proportions do not matter here, its kinds of layers do.
_SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "num_hidden_layers": 4, "max_position_embeddings": 256, "sliding_window": 8, "query_pre_attn_scalar": 16, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
    # GPT-2's names
    "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_ctx": 256, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    # experts
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 96, "top_k_experts": 2,
    # linear attention
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    # Gemma 3n and 4
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320, "global_head_dim": 16, "num_global_key_value_heads": 2,
    "laurel_rank": 8, "num_kv_shared_layers": 2,
}


def small_config(id):
    """A catalog's config with four small layers, of all the kinds that it has."""
    from transformers import AutoConfig

    raw = catalog_config(id)
    small = {key: value for key, value in _SMALL.items() if key.endswith("token_id") or raw.get(key) not in (None, 0)}
    kinds = raw.get("layer_types")
    if kinds:
        distinct = list(dict.fromkeys(kinds))
        small["layer_types"] = (distinct * 4)[:4]
    for key in ("no_rope_layers", "intermediate_size", "activation_sparsity_pattern", "mlp_only_layers", "moe_layers"):
        if isinstance(raw.get(key), list):
            small[key] = [small.get(key, 96)] * 4 if key == "intermediate_size" else (
                raw[key][:4] if key not in ("mlp_only_layers", "moe_layers") else [n for n in raw[key] if n < 4])
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if isinstance(value, dict) and "short_factor" in value:
            small[key] = {name: each[:8] if isinstance(each, list) else each for name, each in value.items()}
        if isinstance(value, dict) and "mrope_section" in value:
            small[key] = {**value, "mrope_section": [1, 0, 1]}
    return AutoConfig.for_model(**{**raw, **small})


def batches(packed):
    """Three micro-batches of two ragged rows each, padded or as one sequence."""
    generator, found = torch.Generator().manual_seed(0), []
    for lengths in ((9, 12), (5, 3), (14, 2)):
        if packed:
            ids = torch.randint(3, 300, (1, sum(lengths)), generator=generator)
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            found.append({"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)})
            continue
        ids = torch.randint(3, 300, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def small_model(config, dtype=torch.float32):
    """Its layers are trained whole, everything else is frozen."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train().requires_grad_(False)
    layers = model.get_submodule(describe(config).layers_path)
    layers.requires_grad_(True)
    return model, list(layers)


def learn(model, inputs, schedule=None, autocast=nullcontext):
    """Losses and gradients of a step."""
    def call(batch):
        with autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    model.zero_grad()
    calls = [partial(call, batch) for batch in inputs]
    losses = schedule.step(calls) if schedule else [call() for call in calls]
    return torch.stack(losses), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert not [name for name, gradient in expected[1].items() if not torch.equal(found[1][name], gradient)]


# One of each class of model in the catalog. Experts, linear attention and packing are among what they do.
_FAMILIES = {
    "LlamaForCausalLM": "meta-llama/Llama-3.1-8B", "SmolLM3ForCausalLM": "HuggingFaceTB/SmolLM3-3B",
    "Llama4ForCausalLM": "meta-llama/Llama-4-Scout-17B-16E", "MistralForCausalLM": "mistralai/Mistral-7B-v0.3",
    "Qwen2ForCausalLM": "Qwen/Qwen2.5-7B", "Qwen3ForCausalLM": "Qwen/Qwen3-8B", "Qwen3MoeForCausalLM": "Qwen/Qwen3-30B-A3B",
    "Qwen3_5ForCausalLM": "Qwen/Qwen3.5-27B", "Qwen3_5MoeForCausalLM": "Qwen/Qwen3.5-35B-A3B",
    "Gemma2ForCausalLM": "google/gemma-2-9b", "Gemma3ForCausalLM": "google/gemma-3-12b-it",
    "Gemma4ForCausalLM": "google/gemma-4-31B-it", "Phi3ForCausalLM": "microsoft/Phi-3.5-mini-instruct",
    "GptOssForCausalLM": "openai/gpt-oss-20b", "GPT2LMHeadModel": "openai-community/gpt2",
}
_SHARING = {"Gemma3nForCausalLM": "google/gemma-3n-E4B-it", "Gemma4ForCausalLM": "google/gemma-4-E2B-it"}


def test_every_class_of_the_catalog_is_tested():
    classes = {catalog_config(id)["architectures"][0] for id in catalog_ids()}
    assert classes == {*_FAMILIES, *_SHARING}


@pytest.mark.parametrize("name", _FAMILIES)
def test_a_step_is_the_plain_step(name):
    """Losses and every gradient, to the last bit, hidden states waiting in host memory."""
    model, layers = small_model(small_config(_FAMILIES[name]))
    inputs = batches(packed=False)
    plain = learn(model, inputs)
    schedule = Schedule(layers, AllThere(len(layers)), kept=OnHost("cpu"))
    assert_same(learn(model, inputs, schedule), plain)
    assert_same(learn(model, inputs, schedule), plain)  # nothing of a step is left for the next
    schedule.remove()
    assert_same(learn(model, inputs), plain)


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_autocast_packing_and_some_micro_batches_at_a_time(at_once, packed):
    model, layers = small_model(small_config(_FAMILIES["Gemma3ForCausalLM"]))
    inputs = batches(packed)

    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    plain = learn(model, inputs, autocast=autocast)
    schedule = Schedule(layers, AllThere(len(layers)), autocast=autocast, at_once=at_once)
    assert_same(learn(model, inputs, schedule, autocast), plain)


def test_evaluation_and_generation_are_the_plain_ones():
    model, layers = small_model(small_config(_FAMILIES["LlamaForCausalLM"]))
    model.eval()
    inputs = batches(packed=False)
    prompt = {"input_ids": inputs[0]["input_ids"][1:], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        losses, text = [model(**batch).loss for batch in inputs], model.generate(**prompt)
        schedule = Schedule(layers, AllThere(len(layers)))
        assert schedule.forward([lambda batch=batch: model(**batch).loss for batch in inputs]) == losses
        assert torch.equal(model.generate(**prompt), text)


def test_dropout_is_the_same_in_both_passes():
    """A layer is computed twice, with the random numbers of the first time: the gradient is that of the loss that was told. With
    one micro-batch the numbers come in the plain order too.
    """
    config = small_config(_FAMILIES["LlamaForCausalLM"])
    config.attention_dropout = 0.5
    config._attn_implementation = "eager"
    model, layers = small_model(config)
    torch.manual_seed(1)
    plain, after = learn(model, batches(False)[:1]), torch.rand(1)
    schedule = Schedule(layers, AllThere(len(layers)))
    torch.manual_seed(1)
    assert_same(learn(model, batches(False)[:1], schedule), plain)
    assert torch.equal(torch.rand(1), after)


def test_states_of_random_numbers_are_kept_once_where_nobody_draws_any():
    """They would be 5 kB for each layer and micro-batch, which is more than some hidden states."""
    model, layers = small_model(small_config(_FAMILIES["LlamaForCausalLM"]))
    schedule = Schedule(layers, AllThere(len(layers)))
    states = [schedule._random_now(torch.device("cpu")) for _ in range(3)]
    assert states[0][0] is states[1][0] is states[2][0]
    torch.rand(1)
    assert not torch.equal(schedule._random_now(torch.device("cpu"))[0], states[0][0])


@pytest.mark.parametrize("name", _SHARING)
def test_layers_that_share_keys_and_values_are_refused(name):
    """The gradient through them would be lost, silently."""
    model, layers = small_model(small_config(_SHARING[name]))
    kept = OnDevice()
    schedule = Schedule(layers, AllThere(len(layers)), kept=kept)
    with pytest.raises(ModelError, match="by themselves") as caught:
        learn(model, batches(False), schedule)
    assert "memory.streaming: false" in caught.value.fix
    assert not kept._held


class Stack(torch.nn.Module):
    """Layers, and what is done with the hidden states around each."""

    def __init__(self, between):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.between = between

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(self.between(hidden))
        return hidden.sum()


@pytest.mark.parametrize(("between", "refused"), [(lambda h: h, False), (lambda h: h + 1, True), (lambda h: h[:, :2], True)],
                         ids=["nothing", "a sum", "a part"])
def test_what_a_model_computes_between_its_layers_is_not_left_out(between, refused):
    model = Stack(between)
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def call():
        loss = model(hidden)
        loss.backward()
        return loss.detach()

    if refused:
        with pytest.raises(ModelError, match="between its layers"):
            Schedule(model.layers, AllThere(3)).step([call])
        return
    plain, gradients = call(), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert torch.equal(Schedule(model.layers, AllThere(3)).step([call])[0], plain)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_step_that_fails_leaves_nothing_behind_and_can_be_run_again(when):
    model, layers = small_model(small_config(_FAMILIES["LlamaForCausalLM"]))
    inputs, left = batches(False), [1]
    plain = learn(model, inputs)
    original = layers[2].forward

    def fails_once(*args, **kwargs):
        if left and torch.is_grad_enabled() == (when == "backward"):
            left.clear()
            raise torch.OutOfMemoryError("injected")
        return original(*args, **kwargs)

    layers[2].forward = fails_once
    kept = OnDevice()
    schedule = Schedule(layers, AllThere(len(layers)), kept=kept)
    with pytest.raises(torch.OutOfMemoryError):
        learn(model, inputs, schedule)
    assert not kept._held
    assert_same(learn(model, inputs, schedule), plain)
    assert not kept._held
