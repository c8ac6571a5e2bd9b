"""Hand-written backward passes: the results and gradients of PEFT's layers, with less kept for them."""

import copy
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from faults.parameters import in_long
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from truth import CPU

from qlora import _compat
from qlora.architecture import describe, select_targets
from qlora.engine.arena import Binding, aligned_block, fill, layer_layout, places_of
from qlora.engine.dense import DenseVisit, dense_weight
from qlora.engine.fused import install_fused, is_fused, remove_fused
from qlora.engine.mlp_forms import mlp_form
from qlora.engine.renormalise import NormForward, is_norm
from qlora.engine.tiled_mlp import install_tiled_mlp, tiles
from qlora.model.adapt import add_adapters
from qlora.model.build import build_base
from qlora.model.exact import make_exact
from qlora.model.meta import build_base_on_meta
from qlora.planning.autocast import AutocastOnMeta
from qlora.precision import Precision, torch_dtype

pytestmark = pytest.mark.usefixtures("one_thread")

# Ratios of real models: the inner width 3.5 or 4 times the hidden one, fewer heads of keys than of queries, Gemma's wide heads.
ROUND = {"num_hidden_layers": 2, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 512,
         "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
GEMMA = {"intermediate_size": 2048, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
REAL = {
    "llama": ("llama", ROUND),
    "qwen3": ("qwen3", {**ROUND, "head_dim": 64}),
    "gemma2": ("gemma2", {**ROUND, **GEMMA}),
    "gemma3": ("gemma3_text", {**ROUND, **GEMMA}),
}
TINY = {**ROUND, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL = {
    **{name: (family, {**sizes, **TINY, "head_dim": 16}) for name, (family, sizes) in REAL.items()},
    "llama, with biases": ("llama", {**TINY, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", TINY),
    "phi3": ("phi3", {**TINY, "pad_token_id": 0}),
    "starcoder2": ("starcoder2", {**TINY, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 256, "n_positions": 256, "bos_token_id": 1,
                      "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}
PRECISIONS = {
    "bf16": Precision("bf16", "bf16", False, "a test"),
    "fp32": Precision("fp32", "fp32", False, "a test"),
    "fp16": Precision("fp16", "fp32", True, "a test"),
}


def build(shape, compute="bf16", *, alpha=16, dropout=0.0, meta=False):
    """A 4-bit base with adapters that have been trained a little, B is not zero, and norms and biases that matter."""
    from transformers import AutoConfig

    family, sizes = shape
    config, precision = AutoConfig.for_model(family, **sizes), PRECISIONS[compute]
    attention = "eager" if family == "gemma2" else "sdpa"
    if meta:
        base = build_base_on_meta(config, precision=precision, attention=attention)
    else:
        base = build_base("nowhere", config, device=CPU, precision=precision, weights="random", attention=attention)
        _compat.use_plain_cpu_kernels(base)
    model = add_adapters(base, select_targets(describe(config)), r=8, alpha=alpha, dropout=dropout, seed=0,
                         dtype=torch_dtype(precision.adapters))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and not meta:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        elif parameter.ndim == 1 and not meta:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


class LayerRun:
    """The second layer of a model and what the model calls it with for rows of tokens."""

    def __init__(self, model, rows=2, tokens=32, autocast=False):
        base = model.get_base_model()
        self.layer = (base.transformer.h if hasattr(base, "transformer") else base.model.layers)[1]
        self.autocast = (lambda: torch.autocast("cpu", torch.float16)) if autocast else nullcontext
        with self.layer.register_forward_pre_hook(self._take, with_kwargs=True), torch.no_grad(), self.autocast():
            device = next(model.parameters()).device
            model(input_ids=(torch.arange(rows * tokens, device=device) * 7 % 250).view(rows, tokens), use_cache=False)
        generator = torch.Generator().manual_seed(3)
        self.gradient = torch.randn(self.args[0].shape, generator=generator).to(self.args[0])

    def _take(self, module, args, kwargs):
        self.args, self.kwargs = args, kwargs

    def forward(self, x):
        with self.autocast():
            y = self.layer(x, *self.args[1:], **self.kwargs)
        return y[0] if isinstance(y, tuple) else y

    def __call__(self, hook=lambda tensor: tensor):
        """y, dL/dx and the adapters' gradients, by name; `hook` sees what is kept for the backward pass."""
        x = self.args[0].detach().clone().requires_grad_()
        before = x.detach().clone()
        for parameter in self.layer.parameters():
            parameter.grad = None
        with saved_tensors_hooks(hook, lambda tensor: tensor):
            y = self.forward(x)
        y.backward(self.gradient)
        assert x.is_meta or torch.equal(x, before)
        grads = {name: p.grad.clone() for name, p in self.layer.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "x": x.grad, **grads}

    def kept_bytes(self):
        """Bytes of the storages that are kept for the backward pass, shared ones once; without parameters and what the layer is
        given beside x: masks and rotations, which serve all layers.
        """
        kept, given = {}, {parameter.untyped_storage()._cdata for parameter in self.layer.parameters()}
        for value in (*self.args[1:], *self.kwargs.values()):
            tensors = value if isinstance(value, tuple) else [value]
            given.update(tensor.untyped_storage()._cdata for tensor in tensors if isinstance(tensor, torch.Tensor))

        def hook(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        self(hook)
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in given)


def distance(first, second):
    """The largest relative distance of two results' tensors."""
    assert first.keys() == second.keys() and len(first) > 6
    assert all(first[name].norm() > 0 for name in first)
    return max(float((first[name].double() - second[name].double()).norm() / first[name].double().norm()) for name in first)


# --- fused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", PRECISIONS)
@pytest.mark.parametrize("family", SMALL)
def test_results_and_gradients_are_those_of_peft(family, compute):
    """In bf16 to the last bit. In fp32 autograd adds a norm's two terms one by one; in fp16 PEFT converts to and fro on a CPU."""
    model = build(SMALL[family], compute)
    run = LayerRun(model, autocast=compute == "fp16")
    expected = run()
    assert install_fused(model) == []
    assert {is_fused(m) for n, m in run.layer.named_modules() if hasattr(m, "lora_A")} == {True}
    found = run()
    assert distance(expected, found) < (1e-3 if compute == "fp16" else 1e-5)
    if compute == "bf16":
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    remove_fused(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")
    assert all(torch.equal(expected[name], value) for name, value in run().items())


@pytest.mark.parametrize("alpha", [32, 12])
def test_scaled_adapters(alpha):
    """By a power of two, which is exact, and by another number."""
    run = LayerRun(model := build(SMALL["llama"], alpha=alpha))
    expected = run()
    install_fused(model)
    assert distance(expected, run()) < 1e-9


@pytest.mark.parametrize("family", ["llama", "qwen3", *in_long(*sorted(set(REAL) - {"llama", "qwen3"}))])
def test_a_layer_keeps_little_more_than_half(family):
    """Rows of 256 tokens and more, in training, adapters in bf16; and of fp16 with fp32 adapters no more than that."""
    run = LayerRun(model := build(REAL[family]), rows=1, tokens=256)
    peft = run.kept_bytes()
    install_fused(model)
    assert run.kept_bytes() <= 0.55 * peft
    run = LayerRun(model := build(REAL[family], "fp16"), rows=1, tokens=256, autocast=True)
    mixed = run.kept_bytes()
    install_fused(model)
    assert run.kept_bytes() <= 0.55 * min(peft, mixed)


def test_what_is_kept_is_what_the_docstring_says():
    """In Llama: x, q, k, v, what attention gives, the residual, e and g."""
    run = LayerRun(model := build(REAL["llama"]), rows=1, tokens=256)
    install_fused(model)
    vectors = run.kept_bytes() / (256 * 512 * 2)
    assert 11.5 <= vectors < 11.6


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_weights_may_be_elsewhere_by_the_backward_pass(family):
    """Another block, the first one overwritten. Nothing that is kept is a frozen tensor, or lies in the block."""
    run = LayerRun(model := build(SMALL[family]))
    install_fused(model)
    expected, layout = run(), layer_layout(run.layer)
    blocks = [aligned_block(layout.size_bytes) for _ in range(2)]
    for block in blocks:
        fill(layout, block, {place.name: place.tensor for place in places_of(run.layer)})
    binding = Binding(run.layer, layout)
    binding.bind(blocks[0])
    x = run.args[0].detach().clone().requires_grad_()

    def hook(tensor):
        assert tensor.untyped_storage()._cdata != blocks[0].untyped_storage()._cdata
        return tensor

    run.layer.zero_grad()
    with saved_tensors_hooks(hook, lambda tensor: tensor):
        y = run.forward(x)
    blocks[0].fill_(255)
    binding.bind(blocks[1])
    y.backward(run.gradient)
    assert torch.equal(x.grad, expected["x"])
    for name, parameter in run.layer.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name])


def tokens(rows=3, length=40):
    return (torch.arange(rows * length) * 7 % 250).view(rows, length)


def learn(model, ids=None, autocast=nullcontext):
    """Logits and the adapters' gradients of a whole model."""
    model.zero_grad()
    with autocast():
        logits = model(input_ids=tokens() if ids is None else ids, use_cache=False).logits
    logits.float().pow(2).sum().mul(0.1).backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_a_whole_model_with_checkpointing(family, compute):
    model, autocast = build(SMALL[family], compute), nullcontext
    if compute == "fp16":
        def autocast():
            return torch.autocast("cpu", torch.float16)
    expected = learn(model, autocast=autocast)
    install_fused(model)
    limit = 0 if compute == "bf16" else 1e-3
    assert distance(expected, learn(model, autocast=autocast)) <= limit
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert distance(expected, learn(model, autocast=autocast)) <= limit


def test_a_graph_that_is_used_twice():
    """Nothing is overwritten that a second backward pass needs."""
    run = LayerRun(model := build(SMALL["llama"]))
    install_fused(model)
    x = run.args[0].detach().clone().requires_grad_()
    y, wanted = run.forward(x), [p for p in run.layer.parameters() if p.requires_grad]
    first = torch.autograd.grad(y, [x, *wanted], run.gradient, retain_graph=True)
    torch.autograd.grad(y, wanted[:1], run.gradient, retain_graph=True)  # some readers of a norm alone
    again = torch.autograd.grad(y, [x, *wanted], run.gradient)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_norms_output_that_was_written_to_is_kept_itself():
    run = LayerRun(model := build(SMALL["llama"]))
    norm, layer = run.layer.input_layernorm, run.layer.self_attn.o_proj
    x, found = run.args[0].detach(), []
    for install in (lambda model: None, install_fused):
        install(model)
        layer.zero_grad()
        normed = norm(x.clone().requires_grad_())
        with torch.no_grad():
            normed.mul_(2)
        layer(normed).backward(run.gradient)
        found.append(layer.lora_A["default"].weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_what_is_done_in_parts_is_the_same(family, monkeypatch):
    """Norms and the adapters' part of a result go some rows at a time where they are large."""
    run = LayerRun(model := build(SMALL[family]))
    expected = run()
    monkeypatch.setattr("qlora.engine.renormalise._AT_ONCE", 700)
    monkeypatch.setattr("qlora.engine.lora_product._AT_ONCE", 500)
    install_fused(model)
    found = run()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_norm_has_few_fp32_numbers_at_once(monkeypatch):
    model = build(SMALL["llama"])
    norm, x = model.get_base_model().model.norm, torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr("qlora.engine.renormalise._AT_ONCE", 700)
    largest = []
    for install in (lambda model: None, install_fused):
        install(model)
        with Watch(lambda out: out.numel() if out.dtype == torch.float32 else 0) as watch:
            norm(x).backward(torch.ones_like(x))
        largest.append(watch.largest)
    assert largest == [6400, 640]


class Watch(TorchDispatchMode):
    """The largest size that any operator's result has."""

    def __init__(self, size):
        super().__init__()
        self.size, self.largest = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, self.size(out))
        return out


def test_few_tokens_are_left_to_kernels(monkeypatch):
    """Without a graph and in evaluation no whole weight is dequantised for them by us."""
    model, calls, real = build(SMALL["llama"]).eval(), [], bnb.functional.dequantize_4bit
    install_fused(model)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: calls.append(1) or real(*args))
    with torch.no_grad():
        model(input_ids=tokens(1, 63))
        assert not calls
        model(input_ids=tokens(1, 64))
        assert len(calls) == 14
        model.train()(input_ids=tokens(1, 5))  # what a schedule computes again must be what it was
        assert len(calls) == 28


def test_evaluation_and_generation():
    """Word by word with a cache, and a batch without a graph; both as PEFT's layers do it."""
    model = build(SMALL["qwen3"], "fp32").eval()
    ids = tokens(2, 70)

    def answer():
        with torch.no_grad():
            return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)

    with torch.no_grad():
        expected, words = model(input_ids=ids).logits, answer()
    install_fused(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert model(input_ids=ids).logits.grad_fn is None
    assert torch.equal(answer(), words)


def test_attention_with_dropout_draws_its_numbers_once():
    family, sizes = SMALL["gemma2"]
    run = LayerRun(model := build((family, {**sizes, "attention_dropout": 0.2})))
    found = []
    for install in (lambda model: None, install_fused):
        install(model)
        torch.manual_seed(4)
        found.append(run())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_adapters_that_are_switched_off_or_merged():
    model = build(SMALL["llama"])
    with torch.no_grad(), model.disable_adapter():
        expected = model(input_ids=tokens()).logits
    install_fused(model)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens()).logits, expected)
        assert not torch.equal(model(input_ids=tokens()).logits, expected)
        model.merge_adapter()
        merged = model(input_ids=tokens()).logits
        remove_fused(model)
        assert torch.equal(model(input_ids=tokens()).logits, merged)


def test_names_and_what_is_saved_stay_the_same(tmp_path):
    from peft import get_peft_model_state_dict

    model = build(SMALL["llama"])
    names, adapter = list(model.state_dict()), get_peft_model_state_dict(model)
    parameters = dict(model.named_parameters())
    install_fused(model)
    install_tiled_mlp(model, 16)
    assert list(model.state_dict()) == names and get_peft_model_state_dict(model).keys() == adapter.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    with pytest.raises(AssertionError):
        install_fused(model)


def test_what_is_left_to_peft_is_said():
    model = build(SMALL["llama"], dropout=0.1)
    expected = {type(module) for module in model.modules()}
    notes = install_fused(model)
    assert notes == ["14 adapted layers are left to PEFT: its adapter has dropout."]
    assert {type(module) for module in model.modules()} == expected and not any(map(is_fused, model.modules()))
    assert len(install_tiled_mlp(model, 8)) == 1
    learn(model)


@pytest.mark.parametrize("tile", [None, 16])
def test_micro_batches_in_parts_stay_exact_in_fp32(tile):
    """With halves of adapters that sum row by row: four rows at once give the gradients of two times two, to the last bit."""
    model = build(SMALL["llama"], "fp32")

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            (model(input_ids=part, use_cache=False).logits.pow(2).sum() / 160 / 256).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    ids = tokens(4, 40)
    plain = gradients([ids])
    make_exact(model)
    install_fused(model)
    if tile:
        install_tiled_mlp(model, tile)
    whole = gradients([ids])
    for parts in (ids.split(2), ids.split(1), ids.split(3)):
        assert all(torch.equal(value, whole[name]) for name, value in gradients(parts).items())
    assert distance(plain, whole) < 1e-4  # of a whole model


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_on_meta_it_keeps_what_it_keeps_for_real(family, compute):
    half, kept = torch.float16 if compute == "fp16" else None, []
    for tile in (None, 16):
        for meta in (False, True):
            with _compat.pretend_device({}, triton=False, autocast=half) if meta else nullcontext():
                model = build(SMALL[family], compute, meta=meta)
                install_fused(model)
                if tile:
                    install_tiled_mlp(model, tile)
                mixed = AutocastOnMeta(half) if half and meta else torch.autocast("cpu", half) if half else nullcontext()
                kept.append(kept_for_mlp(model, mixed))
    assert kept[0] == kept[1] and kept[2] == kept[3] and kept[2] < kept[0]


def kept_for_mlp(model, mixed):
    """Bytes, for the MLP of a layer and the norm before it."""
    base = model.get_base_model()
    layer = (base.transformer.h if hasattr(base, "transformer") else base.model.layers)[1]
    norm, kept = getattr(layer, "post_attention_layernorm", None) or layer.ln_2, {}
    device = next(model.parameters()).device
    dtype = mlp_form(layer.mlp).projections(layer.mlp)[0].get_base_layer().compute_dtype
    x = torch.ones(2, 30, 64, dtype=dtype, device=device, requires_grad=True)

    def hook(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with mixed, saved_tensors_hooks(hook, lambda tensor: tensor):
        y = layer.mlp(norm(x))
    y.backward(torch.ones_like(y))
    assert x.grad.shape == x.shape and all(p.grad is not None for p in layer.mlp.parameters() if p.requires_grad)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# --- dense weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_visit_changes_no_bit(compute, fused):
    model = build(SMALL["llama, with biases"], compute)
    if fused:
        install_fused(model)
    run = LayerRun(model, autocast=compute == "fp16")
    expected = run()
    visit = DenseVisit(run.layer)
    for _ in range(2):
        with visit:
            found = run()
            again = run()
        assert all(torch.equal(expected[name], found[name]) and torch.equal(expected[name], again[name]) for name in expected)
    modules = [module for module in run.layer.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert modules and not any("forward" in module.__dict__ or "_dense" in module.__dict__ for module in modules)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (1, 64), (0, 64)])
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize("training", [True, False])
def test_one_layer_of_any_input(shape, compute, training):
    """Inputs of its own type and of another; with a bias; in both modes."""
    module = build(SMALL["llama, with biases"], compute).get_base_model().model.layers[0].mlp.up_proj.base_layer.train(training)
    for dtype in (module.compute_dtype, torch.float32):
        found = []
        for context in (nullcontext(), DenseVisit(module)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
            with context:
                y = module(x)
                y.backward(torch.ones_like(y))
            found.append((y, x.grad))
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(*found, strict=True))


def test_a_visit_dequantises_each_weight_once(monkeypatch):
    run = LayerRun(model := build(SMALL["llama"]))
    install_fused(model)
    calls, real = [], bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: calls.append(1) or real(*args))
    with DenseVisit(run.layer) as visit:
        run()
        run()
        assert len(calls) == 7
        projection = run.layer.mlp.up_proj.base_layer
        assert dense_weight(projection) is dense_weight(projection)
        with pytest.raises(AssertionError):
            visit.__enter__()
    assert dense_weight(projection) is not dense_weight(projection)


def test_the_backward_pass_may_come_after_the_visit():
    run = LayerRun(build(SMALL["llama"]))
    expected, x = run(), run.args[0].detach().clone().requires_grad_()
    run.layer.zero_grad()
    with DenseVisit(run.layer):
        y = run.forward(x)
    y.backward(run.gradient)
    assert torch.equal(x.grad, expected["x"])


# --- tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", PRECISIONS)
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("fused", [False, True])
def test_tiles_give_the_same_up_to_rounding(family, compute, fused):
    model = build(SMALL[family], compute)
    run = LayerRun(model, autocast=compute == "fp16")
    expected, kept = run(), run.kept_bytes()
    if fused:
        install_fused(model)
        kept = run.kept_bytes()
    assert install_tiled_mlp(model, 10) == []
    assert distance(expected, run()) < (1e-5 if compute == "fp32" else 5e-3)
    assert run.kept_bytes() < kept


@pytest.mark.parametrize("fused", [False, True])
def test_inside_an_mlp_there_is_one_tile(fused):
    """No tensor of the inner width is longer, forward or backward."""
    def tokens_of(out):
        inside = out.is_floating_point() and out.shape[-1:] == (96,) and out.numel() != 64 * 96  # that is a weight
        return out.numel() // 96 if inside else 0

    run = LayerRun(model := build(SMALL["llama"]), rows=2, tokens=50)
    if fused:
        install_fused(model)
    with Watch(tokens_of) as watch:
        run()
    assert watch.largest == 100
    install_tiled_mlp(model, 20)
    with Watch(tokens_of) as watch:
        run()
    assert watch.largest == 20


@pytest.mark.parametrize("shape", [(7, 4), (40, 4), (1, 40, 4), (3, 40, 4), (5, 3, 4), (2, 1, 4), (0, 4), (2, 0, 4)])
@pytest.mark.parametrize("size", [1, 7, 10, 1000])
def test_tiles_cover_every_token_once(shape, size):
    count = torch.zeros(shape)
    for tile in tiles(count.shape, size):
        assert 0 < count[tile].numel() <= size * 4
        count[tile] += 1
    assert (count == 1).all()


def test_a_rows_tiles_do_not_depend_on_other_rows():
    one = [tile[1] for tile in tiles(torch.Size((1, 40, 4)), 16)]
    assert [tile[1] for tile in tiles(torch.Size((3, 40, 4)), 16)] == one * 3


# --- finding modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL)
def test_mlps_and_norms_are_found(family):
    """On meta and without weights too."""
    model = build(SMALL[family], meta=True)
    forms = [form for module in model.modules() if (form := mlp_form(module))]
    assert len(forms) == 2 and forms[0] == forms[1]
    expected = {"phi3": ("gate_up_proj", "gate_up_proj", "down_proj", "gate"), "gpt2": ("c_fc", None, "c_proj", None),
                "starcoder2": ("c_fc", None, "c_proj", None)}.get(family, ("gate_proj", "up_proj", "down_proj", None))
    assert (forms[0].gate, forms[0].up, forms[0].down, forms[0].joined) == expected
    norms = [name for name, module in model.named_modules() if is_norm(module)]
    assert len(norms) == {"gpt2": 0, "starcoder2": 0, "qwen3": 9, "gemma2": 9, "gemma3": 13}.get(family, 5)
    install_fused(model)
    assert sum(isinstance(m.__dict__.get("forward"), NormForward) for m in model.modules()) == len(norms)


class Other(torch.nn.Module):
    """An MLP that is not quite one."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.act = kind, torch.nn.SiLU()
        self.one, self.two, self.three = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x):
        gate, up = self.act(self.one(x)), self.two(x)
        if self.kind == "clamped":
            up = up.clamp(max=0.1)
        if self.kind == "residual":
            return x + self.three(gate * up)
        if self.kind == "asks for more":
            return self.three(gate * up) * self.missing
        if self.kind == "random":
            return torch.nn.functional.dropout(self.three(gate * up), 0.1, self.training)
        return self.three(gate * up)


def test_what_only_looks_like_an_mlp_is_none():
    assert mlp_form(Other("plain")).gate == "one"
    for kind in ("clamped", "residual", "asks for more", "random"):
        assert mlp_form(Other(kind)) is None, kind


class Scale(torch.nn.Module):
    """It has a norm's weight, and does not normalise."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("module", [torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.PReLU(8), Scale()])
def test_what_is_no_norm(module):
    assert not is_norm(module.requires_grad_(False))


def test_a_norm_that_is_trained_is_left_alone():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert not is_norm(LlamaRMSNorm(8)) and is_norm(LlamaRMSNorm(8).requires_grad_(False))
    assert is_norm(copy.deepcopy(LlamaRMSNorm(8)).to("meta").requires_grad_(False))
