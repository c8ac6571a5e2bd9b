"""The loss in chunks and the head in its four formats, against full logits in fp32 and against TRL's own."""

import math

import pytest
import torch
import truth
from torch.nn import functional as F

from qlora.architecture import describe, find_config, select_targets
from qlora.engine import loss as engine_loss
from qlora.engine.head import Int8Head, Nf4Head, ResidentHead, StreamedHead, make_head
from qlora.engine.host_embedding import embed_on_host
from qlora.engine.loss import LanguageModelLoss, chunked_cross_entropy, logit_transform
from qlora.generation import answer
from qlora.model.adapt import add_adapters
from qlora.model.build import build_base, load_tokenizer, locate_base
from qlora.planning.kernels_cpu import cpu_temporaries
from qlora.planning.trace import Recorder
from qlora.precision import torch_dtype
from qlora.training.cpu_memory import TensorMeter

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MIB = 2**20
SIZES = dict(num_hidden_layers=2, vocab_size=512, hidden_size=64, intermediate_size=128, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "llama": ("llama", SIZES),
    "gemma2": ("gemma2", {**SIZES, "final_logit_softcapping": 2.0}),  # so low that it bends
    "gemma3": ("gemma3_text", {**SIZES, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("granite", {**SIZES, "logits_scaling": 3.0}),
    "gpt2": ("gpt2", dict(n_layer=2, n_head=2, n_embd=64, vocab_size=512, n_positions=128, bos_token_id=1, eos_token_id=2,
                          resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of untrained models with weights large enough for logits that differ."""
    from transformers import AutoConfig

    made = {}

    def folder(family):
        if family not in made:
            kind, sizes = FAMILIES[family]
            made[family] = tmp_path_factory.mktemp(family)
            truth.save_base(AutoConfig.for_model(kind, initializer_range=0.2, **sizes), made[family])
        return made[family]

    return folder


def build(folder, compute="fp32", before=lambda base: None):
    """A 4-bit base with adapters that do something; `before` sees it without them."""
    config, precision = find_config(str(folder)), truth.PRECISIONS[compute]
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    base = build_base(str(folder), config, device=truth.CPU, precision=precision, attention=attention)
    before(base)
    model = add_adapters(base, select_targets(describe(config)), r=4, alpha=4, seed=0, dtype=torch_dtype(precision.adapters))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model.train()


def batch(rows=3, tokens=21):
    """Padded rows; of two in five tokens there is nothing to learn."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 500, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.tensor([tokens, tokens - 6, tokens - 2][:rows])[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=generator) < 0.4), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return found


def distance(found, expected):
    """Of two sets of gradients, relative to the second."""
    difference = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return float((difference / sum(value.double().square().sum() for value in expected.values())).sqrt())


def problem(dtype=torch.float32, n=25, tokens=500, width=72, bias=False):
    """Hidden states, targets and a head's weight and bias. The width is no multiple of 64."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(tokens, width, generator=generator) * 0.3).to(dtype)
    hidden = torch.randn(n, width, generator=generator).to(dtype)
    targets = torch.randint(0, tokens, (n,), generator=generator)
    targets[::3] = -100
    return hidden, targets, weight, torch.randn(tokens, generator=generator).to(dtype) if bias else None


def reference(hidden, targets, weight, bias, softcap=None, scale=1.0):
    """Loss and gradient by full logits in fp32."""
    hidden = hidden.detach().float().requires_grad_()
    logits = F.linear(hidden, weight.float(), None if bias is None else bias.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    loss.backward()
    return loss.detach(), hidden.grad


def ours(hidden, targets, head, **options):
    hidden = hidden.detach().requires_grad_()
    loss = chunked_cross_entropy(hidden, targets, head, **options)
    loss.backward()
    return loss.detach(), hidden.grad


class TiledHead(ResidentHead):
    """A resident head that has to be taken in tiles."""

    sliceable = False


def heads(weight, bias):
    return {"resident": ResidentHead(weight, bias), "tiled": TiledHead(weight, bias), "streamed": StreamedHead(weight, bias, CPU)}


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resident", "tiled", "streamed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 3.0}], ids=str)
def test_loss_and_gradient_of_full_logits(kind, bias, options):
    """In fp32, at every size of a chunk: one row, some that do not divide anything, all at once."""
    hidden, targets, weight, bias = problem(bias=bias)
    loss, gradient = reference(hidden, targets, weight, bias, **options)
    assert gradient.abs().max() > 0.01
    for chunk_bytes in (1, 40_001, 2**30):
        found, slope = ours(hidden, targets, heads(weight, bias)[kind], chunk_bytes=chunk_bytes, **options)
        assert found.dtype == torch.float32 and slope.dtype == hidden.dtype
        assert abs(found / loss - 1) < 1e-5, chunk_bytes
        assert (slope - gradient).norm() < 1e-5 * gradient.norm(), chunk_bytes
        assert torch.equal(slope[targets == -100], torch.zeros_like(slope[targets == -100]))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
@pytest.mark.parametrize("kind", ["resident", "tiled"])
def test_16_bit_heads_are_as_exact_as_16_bits_are(kind, dtype, bound):
    """Bounds are two units in the last place, of a gradient as a whole; the loss is a sum of 16 rounded logits."""
    hidden, targets, weight, bias = problem(dtype, bias=True)
    loss, gradient = reference(hidden, targets, weight, bias)
    found, slope = ours(hidden, targets, heads(weight, bias)[kind], chunk_bytes=40_000)
    assert abs(found / loss - 1) < bound / 8
    assert slope.dtype == dtype and (slope.float() - gradient).norm() < bound * gradient.norm()


def test_gradients_below_fp16_survive_until_the_loss_scale_comes():
    """With a divisor of many tokens a gradient in fp16 would be nothing; the scale, which comes later, makes it large again."""
    hidden, targets, weight, _ = problem(torch.float16)
    hidden = hidden.requires_grad_()
    (chunked_cross_entropy(hidden, targets, ResidentHead(weight, None), chunk_bytes=MIB, divisor=10**6) * 2**16).backward()
    _, gradient = reference(hidden, targets, weight, None)
    assert (hidden.grad.float() / (2**16 / 10**6) - gradient).norm() < 2**-10 * gradient.norm()
    hidden.grad = None
    (chunked_cross_entropy(hidden, targets, ResidentHead(weight, None), chunk_bytes=MIB) * 2**20).backward()
    assert not hidden.grad.isfinite().all()  # which is what a loss scaler looks for


@pytest.mark.parametrize("kind", ["resident", "tiled"])
def test_a_long_tail_survives_in_fp16(kind):
    """60,000 tokens, all equally probable: each is so small in fp16 that it would be rounded by 0.14 %, all to one side."""
    weight = torch.ones(60_000, 16, dtype=torch.float16)
    weight[0] = 0
    hidden, targets = torch.zeros(2, 16, dtype=torch.float16), torch.zeros(2, dtype=torch.long)
    _, slope = ours(hidden, targets, heads(weight, None)[kind], chunk_bytes=100_000)
    assert torch.allclose(slope.float(), torch.ones(2, 16), rtol=2**-11)


@pytest.mark.parametrize("kind", ["resident", "tiled"])
def test_mixed_types_take_the_products_in_the_heads(kind):
    """Under fp16 or bf16 autocast the last norm's output may be fp32; the gradient is fp32 too."""
    hidden, targets, weight, _ = problem(torch.bfloat16)
    expected, gradient = ours(hidden, targets, heads(weight, None)[kind], chunk_bytes=40_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, slope = ours(hidden.float(), targets, heads(weight, None)[kind], chunk_bytes=40_000)
    assert torch.equal(found, expected) and slope.dtype == torch.float32 and torch.equal(slope.to(gradient.dtype), gradient)
    hidden, targets, weight, _ = problem()
    plain = ours(hidden, targets, heads(weight, None)[kind], chunk_bytes=40_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ours(hidden, targets, heads(weight, None)[kind], chunk_bytes=40_000)
    assert all(torch.equal(*pair) for pair in zip(plain, cast, strict=True))


@pytest.mark.parametrize("kind", ["resident", "tiled", "streamed"])
def test_nothing_to_learn(kind):
    hidden, targets, weight, _ = problem()
    found, slope = ours(hidden, torch.full_like(targets, -100), heads(weight, None)[kind], chunk_bytes=1000, divisor=0)
    assert found == 0 and torch.equal(slope, torch.zeros_like(hidden))


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    hidden, targets, weight, _ = problem()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(engine_loss, "_product", None)
        loss = chunked_cross_entropy(hidden.requires_grad_(), targets, ResidentHead(weight, None), chunk_bytes=MIB)
    assert not loss.requires_grad
    assert torch.equal(loss, ours(hidden, targets, ResidentHead(weight, None), chunk_bytes=MIB)[0])


def test_a_gradient_cannot_be_scaled_twice():
    hidden, targets, weight, _ = problem()
    loss = chunked_cross_entropy(hidden.requires_grad_(), targets, ResidentHead(weight, None), chunk_bytes=MIB)
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_head_changes_no_bit(dtype):
    hidden, targets, weight, bias = problem(dtype, bias=True)
    for chunk_bytes in (700, 40_000, 2**30):
        expected = ours(hidden, targets, TiledHead(weight, bias), chunk_bytes=chunk_bytes)
        streamed = StreamedHead(weight, bias, CPU)
        for _ in range(2):  # the second time tiles of the first are still there
            found = ours(hidden, targets, streamed, chunk_bytes=chunk_bytes)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_the_turn_of_a_streamed_head_costs_nothing():
    """Ten tiles: the way back begins with the two that are there, and so does the next call."""
    weight = torch.randn(640, 64)
    head = StreamedHead(weight, None, CPU)
    order = [(first, tile.clone()) for backwards in (False, True) for first, tile in head.tiles(64, backwards=backwards)]
    assert [first for first, _ in order] == [*range(0, 640, 64), *range(576, -1, -64)]
    assert all(torch.equal(tile, weight[first : first + 64]) for first, tile in order)
    assert head.num_loads == 10 + 8
    assert [first for first, _ in head.tiles(64)] == [*range(0, 640, 64)] and head.num_loads == 18 + 8
    head.release()
    assert [len(tile) for _, tile in head.tiles(600)] == [600, 40]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_on_a_gpu_a_tile_is_there_before_it_is_used(pinned):
    """Many passes in a row, of tiles that take longer to come than to use; from page-locked memory and from other."""
    hidden, targets, weight, _ = problem(torch.bfloat16, n=64, tokens=20_000, width=1024)
    resident = TiledHead(weight.cuda(), None)
    streamed = StreamedHead(weight.pin_memory() if pinned else weight, None, torch.device("cuda"))
    for chunk_bytes in [2**20, 2**23] * 5:
        expected = ours(hidden.cuda(), targets.cuda(), resident, chunk_bytes=chunk_bytes)
        found = ours(hidden.cuda(), targets.cuda(), streamed, chunk_bytes=chunk_bytes)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_fewer_rows_change_no_bit_of_a_row():
    """In fp32 on one thread of a CPU a position's loss and gradient do not depend on how many others there are."""
    hidden, targets, weight, _ = problem(n=60, width=64)
    targets = targets.clamp(min=0)
    for kind in ("resident", "tiled"):
        _, whole = ours(hidden, targets, heads(weight, None)[kind], chunk_bytes=MIB)
        for count in (1, 2, 3, 5, 17):
            assert torch.equal(ours(hidden[:count], targets[:count], heads(weight, None)[kind], chunk_bytes=MIB)[1],
                               whole[:count]), (kind, count)


# --- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_models_give_the_loss_of_their_own_logits(bases, family, kind):
    """Caps, factors and tied embeddings as the model's own forward has them; loss and adapters' gradients within 1e-5."""
    model, inputs = build(bases(family)), batch()
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.float()
    shifted = inputs["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted, ignore_index=-100, reduction="sum") / 100
    expected.backward()
    expected_gradients = gradients(model)
    right = int((logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]).sum())
    loss = LanguageModelLoss(model, make_head(model, kind, CPU), 50_000)
    for count in (100, torch.tensor(100)):
        found = loss(model, inputs, count)
        assert abs(found.item() / expected.item() - 1) < 1e-5
        found.backward()
        assert distance(gradients(model), expected_gradients) < 1e-5
    assert int(loss.last_correct) == right and int(loss.last_count) == int((shifted != -100).sum())
    mean = loss(model, inputs)
    assert mean.item() == pytest.approx(100 * expected.item() / int(loss.last_count), rel=1e-5)


def test_factors_are_read_as_trl_reads_them():
    from types import SimpleNamespace

    def config(**values):
        text = SimpleNamespace(**{"model_type": "x", **values})
        return SimpleNamespace(get_text_config=lambda: text)

    assert logit_transform(config()) == (None, 1.0)
    assert logit_transform(config(logit_scale=None, final_logit_softcapping=30.0)) == (30.0, 1.0)
    assert logit_transform(config(logit_scale=0.0625)) == (None, 0.0625)
    assert logit_transform(config(lm_head_multiplier=0.5, logits_scaling=8.0)) == (None, 0.5)
    assert logit_transform(config(logits_scaling=8.0)) == (None, 0.125)
    assert logit_transform(config(logits_scaling=8.0, model_type="hyperclovax")) == (None, 8.0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_loss_is_trls(bases, family, compute):
    """In bf16 logits are the same numbers, so losses agree to fp32's rounding; gradients are rounded in other places, each to
    half a unit (2**-9): at the softmax, at the end, and here once on the way.
    """
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    inputs = batch()
    model = build(bases(family), compute, before=lambda base: utils.add_fused_lm_head(base, outputs=("log_probs", "is_top1")))
    outputs = model(**inputs, fused_lm_head=True, num_items_in_batch=torch.tensor(90))
    outputs.loss.backward()
    expected = gradients(model)
    loss = LanguageModelLoss(model, make_head(model, "resident", CPU), 60_000)
    found = loss(model, inputs, torch.tensor(90))
    found.backward()
    assert abs(found.item() / outputs.loss.item() - 1) < (1e-6 if compute == "fp32" else 1e-5)
    assert distance(gradients(model), expected) < (1e-5 if compute == "fp32" else 3 * 2**-8)
    assert int(loss.last_correct) == int(outputs.is_top1.sum())


@pytest.mark.parametrize("kind", ["resident", "tiled"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_accuracy_takes_the_first_of_equals(compute, kind):
    """As argmax does; with logits in 16 bits the highest is often there twice."""
    hidden, targets, weight, _ = problem(torch_dtype(compute), n=400, tokens=300, width=16)
    weight[150:] = weight[:150]
    targets = torch.where(torch.arange(400) % 2 == 0, (hidden.float() @ weight.float().T).argmax(-1), targets)
    targets[::5] += 150  # equals that come later, and do not count
    targets = targets.clamp(max=299)
    expected = int((F.linear(hidden, weight).argmax(-1) == targets).sum())
    job = engine_loss._Job(heads(weight, None)[kind], 30_000, None, 1.0, 1)
    assert int(engine_loss._loss_and_correct(hidden, targets, job)[1]) == expected > 100


# --- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 72, 131])
@pytest.mark.parametrize("cls, bytes_per_number, error", [(Int8Head, 1 + 4 / 64, 0.012), (Nf4Head, 0.5 + 4 / 64, 0.10)])
def test_quantised_heads_are_small_and_near(cls, bytes_per_number, error, width):
    """The error is that of normal weights, root mean square, relative to theirs."""
    weight = torch.randn(1000, width, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    head = cls(weight, None, CPU)
    assert sum(t.nbytes for t in head.tensors()) == pytest.approx(weight.numel() * bytes_per_number, rel=2e-3)
    for rows in (9, 77, 900, 1000):
        tiles = list(head.tiles(rows))
        found = torch.cat([tile for _, tile in tiles]).float()
        assert found.shape == weight.shape and tiles[0][1].dtype == torch.bfloat16
        assert 0.3 * error < (found - weight.float()).norm() / weight.float().norm() < error
        if rows > 9:
            continue
        first = found
    assert torch.equal(found, first)  # tiles of any size are the same numbers


@pytest.mark.parametrize("format, bound", [("int8", 0.03), ("nf4", 0.25)])
def test_quantised_heads_train_nearly_the_same(bases, format, bound):
    """Bounds of what is lost: of the gradient, relative, on random weights; the loss moves by less."""
    inputs = batch()
    found = {}
    for kind in ("resident", format):
        model = build(bases("llama"))
        loss = LanguageModelLoss(model, make_head(model, kind, CPU), 30_000)(model, inputs, 100)
        loss.backward()
        found[kind] = loss.item(), gradients(model)
    assert abs(found[format][0] / found["resident"][0] - 1) < bound
    assert 1e-4 < distance(found[format][1], found["resident"][1]) < bound


@pytest.fixture(scope="module")
def tiny():
    folder = locate_base("builtin:tiny")
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "The", "What is two and two?")]
    return folder, tokenizer, prompts


def written(tiny, format, tile_rows=None, compute="bf16", table=False, host=False):
    folder, tokenizer, prompts = tiny
    model = build_base(str(folder), find_config(str(folder)), device=truth.CPU, precision=truth.PRECISIONS[compute])
    model = add_adapters(model, select_targets(describe(model.config)), r=4, alpha=4, seed=0, dtype=torch_dtype(compute))
    if host:
        embed_on_host(model, None, CPU)
    weight = model.get_output_embeddings().weight
    head = make_head(model, format, CPU, weight.data.clone() if table else None) if format else None
    if tile_rows:
        head.tile_rows = tile_rows
    return answer(model, tokenizer, prompts, max_new_tokens=24, stop_ids=[tokenizer.eos_token_id])


def test_every_format_can_write(tiny):
    """A streamed head writes what a resident one writes; quantised ones write something."""
    plain = written(tiny, None)
    assert all(plain) and len(set(plain)) == 3
    assert written(tiny, "resident") == plain
    for options in ({"tile_rows": 100}, {"table": True, "tile_rows": 511}, {"host": True}):
        assert written(tiny, "streamed", **options) == plain, options
    for format in ("int8", "nf4"):
        assert any(written(tiny, format, tile_rows=100)), format


def test_heads_that_share_the_embeddings_weight(bases):
    """Gemma, GPT-2: the embedding keeps its weight whatever becomes of the head."""
    for family in ("gemma3", "gpt2"):
        for format in ("resident", "streamed", "int8", "nf4"):
            model = build(bases(family))
            table = model.get_input_embeddings().weight.data.clone()
            embed_on_host(model, None, CPU)
            make_head(model, format, CPU)
            assert torch.equal(model.get_input_embeddings().weight.data, table)
            with torch.no_grad():
                assert model(**batch()).logits.shape == (3, 21, 512)


def test_what_a_head_leaves_of_the_models_weight(bases):
    model = build(bases("gemma3"))
    head = make_head(model, "resident", CPU)
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight and head.weight.data_ptr() == weight.data_ptr()
    model = build(bases("llama"))
    table = model.get_output_embeddings().weight.data.clone()
    make_head(model, "streamed", CPU, table)
    assert model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    model = build(bases("llama"))
    make_head(model, "nf4", CPU)
    assert model.get_output_embeddings().weight.numel() == 0


def test_logits_of_tiles_cannot_be_trained_through(bases):
    model = build(bases("llama"))
    make_head(model, "streamed", CPU)
    with pytest.raises(AssertionError, match="chunked loss"):
        model(**{key: value for key, value in batch().items() if key != "labels"})


# --- memory ------------------------------------------------------------------------------------------------------------

N, V, H = 300, 5000, 64


def measured(make, chunk_bytes, dtype):
    """What a call takes at its highest, beyond what was there: by torch's profiler on a CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    targets, weight = torch.randint(0, V, (N,), generator=generator), torch.randn(V, H, generator=generator).to(dtype)
    meter = TensorMeter()
    with meter.watching():
        with meter.during("call"):
            chunked_cross_entropy(hidden, targets, make(weight), chunk_bytes=chunk_bytes).backward()
    return meter.allocated["call"]


def recorded(make, chunk_bytes, dtype):
    """The same on meta, by the planner's recorder."""
    hidden = torch.empty(N, H, dtype=dtype, device="meta", requires_grad=True)
    targets, weight = torch.empty(N, dtype=torch.long, device="meta"), torch.empty(V, H, dtype=dtype, device="meta")
    recorder = Recorder("meta", cpu_temporaries())
    for tensor in (hidden, targets, weight):
        recorder.track(tensor, "base")
    there = sum(event.size_bytes for event in recorder.events)
    with recorder:
        chunked_cross_entropy(hidden, targets, make(weight), chunk_bytes=chunk_bytes).backward()
    total = peak = 0
    for event in recorder.trace():
        total += event.size_bytes
        peak = max(peak, total)
    return peak - there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["resident", "tiled", "streamed"])
def test_memory_follows_the_size_of_a_chunk(kind, dtype):
    """Beside the chunk there are hidden states of n positions: their gradient, twice, and a sum in fp32; and little else. For
    tiles, two of them. The recorder sees what the profiler sees.
    """
    make = {"resident": lambda w: ResidentHead(w, None), "tiled": lambda w: TiledHead(w, None),
            "streamed": lambda w: StreamedHead(w, None, w.device)}[kind]
    states = N * H * (4 + 3 * dtype.itemsize) + (N * H * 4 if dtype != torch.float32 else 0)
    full = N * V * 4
    for chunk_bytes in (400_000, 2_400_000):
        peak = measured(make, chunk_bytes, dtype)
        room = chunk_bytes * (2 if kind == "streamed" else 1)
        assert 0.85 * chunk_bytes < peak < room + states + 250_000 < full, chunk_bytes
        assert recorded(make, chunk_bytes, dtype) == pytest.approx(peak, rel=0.03, abs=30_000), chunk_bytes


def test_a_streamed_head_is_no_memory_of_the_device():
    table = torch.empty(V, H, dtype=torch.bfloat16, device="meta")
    recorder = Recorder()
    with recorder:
        head = StreamedHead(table, None, torch.device("meta"))
        for _, tile in head.tiles(256):
            assert tile.is_meta
    assert max(event.size_bytes for event in recorder.trace()) == 256 * H * 2
    assert math.isclose(sum(max(event.size_bytes, 0) for event in recorder.trace()), 2 * 256 * H * 2)
