"""A rehearsal on meta tensors against the memory of the same run on a real CPU, by torch's profiler.

Everything here is measured at the time of the test: small models with real bitsandbytes weights go through our own trainer,
two optimizer steps each, and the highest total of torch's allocator is held against the rehearsal's.
"""

import pytest

torch = pytest.importorskip("torch")

from faults.parameters import in_long
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from truth import ANSWER_TOKENS, CPU, Cell, Truth, measure, save_base, small_config

from qlora.architecture import describe, select_targets
from qlora.planning.kernels_cpu import cpu_attention_kernel, cpu_temporaries

CELLS = [
    Cell("llama"),
    Cell("llama", checkpointing=False, accumulation=2),
    Cell("llama", micro_batch=3, ragged=True, optimizer="adamw_8bit"),
    Cell("llama", micro_batch=2, length=512, packed=True, checkpointing=False),
    Cell("llama", length=800, compute="fp32"),
    Cell("llama", length=16, r=256),  # the optimizer's moment is the highest
    Cell("llama", length=16, r=256, optimizer="adamw_8bit"),
    Cell("qwen3", micro_batch=2, accumulation=2),
    Cell("qwen3", r=8, length=512, optimizer="adamw_8bit", compute="fp32"),
    Cell("qwen3", micro_batch=3, checkpointing=False, ragged=True),
    Cell("qwen3", length=768, checkpointing=False, attention="eager"),
    Cell("qwen3", r=64, length=384, packed=True),
    Cell("gemma2", attention="eager", length=300),
    Cell("gemma2", attention="eager", micro_batch=2, checkpointing=False, compute="fp32"),
    Cell("gpt2"),
    Cell("gpt2", micro_batch=2, length=512, checkpointing=False, optimizer="adamw_8bit"),
    Cell("phi3", length=512, r=32),
    Cell("phi3", micro_batch=4, length=128, checkpointing=False, compute="fp32"),
    # A small vocabulary and a wide MLP: the highest moment is in a layer's backward pass instead of the loss.
    Cell("gpt2", length=512, threads=2,
         sizes=(("vocab_size", 256), ("n_inner", 4096), ("n_embd", 252), ("n_layer", 2))),
    Cell("qwen3", length=1024, attention="eager", sizes=(("vocab_size", 256), ("intermediate_size", 3000))),
]


@pytest.fixture(autouse=True)
def threads_are_put_back():
    """One thread, unless a test says otherwise: buffers grow with threads, and threads of torch and of bitsandbytes that
    wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rehearsed(cell, phases):
    """The highest total of each phase, to the byte: a CPU's allocator rounds nothing up."""
    from qlora.training.rehearsal import Batches, rehearse

    config = small_config(cell)
    events = rehearse(
        config, select_targets(describe(config)), precision=cell.precision, device=CPU, settings=cell.settings(),
        batches=Batches(cell.micro_batch, cell.accumulation, cell.length, ragged=cell.ragged, packed=cell.packed,
                        answer_tokens=ANSWER_TOKENS),
        phases=phases,
    )
    total, peaks = 0, {}
    for event in events:
        total += event.size_bytes
        name = event.phase.partition(":")[0]
        peaks[name] = max(peaks.get(name, 0), total)
    return peaks


def assert_close(found, true):
    """Within 1 %, and never more than 0.5 % under."""
    assert -0.005 <= found / true - 1 <= 0.01, f"rehearsed {found:,} bytes, measured {true:,}: {found / true - 1:+.2%}"


@pytest.mark.parametrize("cell", [*CELLS[::3], *in_long(*CELLS[1::3], *CELLS[2::3])], ids=str)
def test_a_rehearsal_takes_what_the_run_takes(cell, tmp_path):
    torch.set_num_threads(cell.threads)
    true = measure(cell, tmp_path, after=("eval",))
    found = rehearsed(cell, ("train", "eval"))
    assert len(true.losses) == 2 and true.peaks["train"] > 20e6
    assert_close(found["train"], true.peaks["train"])
    assert_close(found["eval"], true.peaks["eval"])


@pytest.mark.parametrize("cell", [
    Cell("llama", length=400), Cell("llama", length=300, ragged=True), Cell("gemma2", length=300, attention="eager"),
], ids=str)
def test_generation_takes_what_was_rehearsed(cell, tmp_path):
    true = measure(cell, tmp_path, after=("generate",)).peaks["generate"]
    assert_close(rehearsed(cell, ("train", "generate"))["generate"], true)


@pytest.mark.parametrize("cell", [
    Cell("llama", length=64), Cell("llama", length=64, compute="fp32"), Cell("qwen3", length=64), Cell("gpt2", length=64),
], ids=str)
def test_loading_takes_what_was_rehearsed(cell, tmp_path):
    """Less the mapped file, which the profiler counts and the system can take back."""
    true = measure(cell, tmp_path)
    mapped = sum(file.stat().st_size for file in tmp_path.glob("base/*.safetensors"))
    assert_close(rehearsed(cell, ("load", "train"))["load"], true.peaks["load"] - mapped)


def test_random_weights_take_what_real_ones_take(tmp_path):
    from qlora.model.build import build_base

    left = {}
    for weights in ("pretrained", "random"):
        cell, truth = Cell("gpt2"), Truth()
        save_base(small_config(cell), tmp_path)
        with truth.watching(), truth.during("load"):
            base = build_base(str(tmp_path), small_config(cell), device=CPU, precision=cell.precision, weights=weights)
        assert all(parameter.isfinite().all() for parameter in base.parameters() if parameter.is_floating_point())
        left[weights] = truth.left["load"]
        del base
    assert left["random"] == left["pretrained"]


def test_cells_cover_what_memory_depends_on():
    assert len(CELLS) >= 16 and len({cell.model for cell in CELLS}) >= 2
    for name in ("r", "micro_batch", "length", "checkpointing", "optimizer", "compute", "attention", "ragged", "packed",
                 "threads"):
        assert len({getattr(cell, name) for cell in CELLS}) > 1, name


# --- each entry of the table -------------------------------------------------------------------------------------------


def inside(func, *args, **kwargs):
    """Bytes that an operator took beyond what it left, measured; and the table's sum for the same on meta."""
    func(*args, **kwargs)  # what is made once and kept is not the operator's
    truth = Truth()
    with truth.watching():
        with truth.during("op"):
            out = func(*args, **kwargs)
    del out
    hidden = cpu_temporaries()[func](*map(as_meta, args), **{key: as_meta(value) for key, value in kwargs.items()})
    return truth.peaks["op"] - truth.left["op"], sum(hidden)


class Calls(TorchDispatchMode):
    """The operators that were called, with their arguments."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func, args))
        return func(*args, **kwargs or {})


def as_meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def near(true, planned):
    """To the byte, but for numbers of a few bytes that operators turn into tensors."""
    return 0 <= true - planned <= 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length, block", [(24, 24), (256, 64), (1000, 256)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threads", [1, 2, *in_long(4)])
def test_flash_attention_takes_its_buffers(dtype, length, block, masked, threads):
    torch.set_num_threads(threads)
    query, key, value = (torch.randn(2, length, heads, 48, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
    mask = torch.zeros(2, 1, length, length, dtype=dtype) if masked else None
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    true, planned = inside(forward, query, key, value, 0.0, not masked, attn_mask=mask)
    assert near(true, planned)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    out, logsumexp = forward(query, key, value, 0.0, not masked, attn_mask=mask)
    for gradient in (torch.ones_like(out), torch.ones(out.shape, dtype=dtype)):
        true, planned = inside(backward, gradient, query, key, value, out, logsumexp, 0.0, not masked, attn_mask=mask)
        if dtype == torch.float32:
            unseen = (threads - 1) * 4 * block  # the other threads' row sums
            assert near(true, planned - unseen)
        else:  # with the blocks of 16-bit products, which are planned from above
            assert planned * 0.75 <= true <= planned + 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(512, 256), (100, 74)])
@pytest.mark.parametrize("threads", [1, 2])
def test_4_bit_weights_take_theirs(dtype, shape, threads):
    torch.set_num_threads(threads)
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape).to(dtype)
    true, planned = inside(torch.ops.bitsandbytes.quantize_4bit.default, weight, 64, "nf4", torch.uint8)
    assert true == pytest.approx(planned, abs=600)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    activations = torch.randn(2, 128, shape[1], dtype=dtype)
    for bias in (None, torch.zeros(shape[0], dtype=dtype)):
        true, planned = inside(
            torch.ops.bitsandbytes.gemm_4bit.default, activations, packed, state.shape, state.state2.absmax, 64, "nf4",
            bias, state.absmax, state.state2.code, state.offset,
        )
        assert near(true, planned) if dtype == torch.float32 else planned * 0.85 <= true <= planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 64), (16, 512)])
def test_the_8_bit_optimizer_takes_its_copies(dtype, shape):
    """Small matrices have 32-bit state, large ones 8-bit state."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    weight.grad = torch.randn(shape).to(dtype)
    with Calls() as calls:
        bnb.optim.AdamW8bit([weight]).step()
    func, args = next(call for call in calls.seen if "optimizer_update" in str(call[0]))
    assert ("8bit" in str(func)) == (weight.numel() >= 4096)
    true, planned = inside(func, *args)
    assert near(true, planned)


@pytest.mark.parametrize("rows, inner, columns", [
    (256, 16, 512), (256, 512, 16), (512, 512, 512), (1024, 1376, 512), (256, 2048, 1024), (1024, 4096, 64),
    (2048, 2048, 16), (1000, 1000, 1024), (300, 320, 77), (600, 4096, 128), (8, 24, 16),
])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("threads", [1, *in_long(2, 4)])
def test_16_bit_products_take_at_most_what_is_planned(rows, inner, columns, a_transposed, threads):
    """oneDNN's blocks depend on the processor: on another one than those of the table they may be fewer."""
    torch.set_num_threads(threads)
    a = torch.randn(inner, rows).t() if a_transposed else torch.randn(rows, inner)
    a, b = a.to(torch.bfloat16), torch.randn(columns, inner, dtype=torch.bfloat16).t()
    true, planned = inside(torch.ops.aten.mm.default, a, b)
    assert true <= planned <= 3 * 2**20 * threads
    batch = a.expand(3, *a.shape).contiguous()[:, :, ::2], b.expand(3, *b.shape)[:, ::2]
    true, planned = inside(torch.ops.aten.bmm.default, *batch)
    assert true <= planned


def test_fp32_products_take_nothing():
    torch.set_num_threads(2)
    assert inside(torch.ops.aten.mm.default, torch.randn(300, 400), torch.randn(400, 500)) == (0, 0)


# --- the attention kernel ----------------------------------------------------------------------------------------------


def heads(count, length, width):
    return torch.randn(2, length, count, width, dtype=torch.bfloat16).transpose(1, 2)


_SQUARE = torch.ones(2, 1, 20, 20, dtype=torch.bool)
CALLS = {
    "plain": ((4, 4, 16, 16), {}),
    "causal": ((4, 4, 16, 16), {"is_causal": True}),
    "scaled": ((4, 4, 16, 16), {"scale": 0.5}),
    "grouped": ((4, 2, 16, 16), {"enable_gqa": True}),
    "boolean mask": ((4, 4, 16, 16), {"attn_mask": _SQUARE}),
    "mask of rows": ((4, 4, 16, 16), {"attn_mask": torch.zeros(20, 20, dtype=torch.bfloat16)}),
    "three-dimensional mask": ((4, 4, 16, 16), {"attn_mask": torch.zeros(1, 20, 20, dtype=torch.bfloat16)}),
    "values of another width": ((4, 4, 16, 8), {"is_causal": True}),
    "dropout": ((4, 4, 16, 16), {"dropout_p": 0.1}),
}


@pytest.mark.parametrize("name", CALLS)
def test_meta_attention_is_that_of_a_cpu(name):
    """The operators of a CPU, and outputs of the same shape and layout; the composed form on meta stores all scores."""
    (count, key_count, width, value_width), settings = CALLS[name]
    tensors = heads(count, 20, width), heads(key_count, 20, width), heads(key_count, 20, value_width)
    with Calls() as real:
        out = F.scaled_dot_product_attention(*tensors, **settings)
    with Calls() as simulated:
        on_meta = cpu_attention_kernel()(*map(as_meta, tensors), **{key: as_meta(value) for key, value in settings.items()})
    assert (on_meta.shape, on_meta.stride(), on_meta.dtype) == (out.shape, out.stride(), out.dtype)
    takes = {func for func, _ in real.seen}
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert (flash in takes) == (name not in ("three-dimensional mask", "values of another width", "dropout"))
    assert takes - {func for func, _ in simulated.seen} <= {torch.ops.aten.scalar_tensor.default}


def test_a_strided_query_takes_the_composed_form():
    query = heads(4, 20, 32)[..., ::2]
    with Calls() as real:
        F.scaled_dot_product_attention(query, query, query)
    on_meta = as_meta(query)
    with Calls() as simulated:
        cpu_attention_kernel()(on_meta, on_meta, on_meta)
    assert [func for func, _ in real.seen] == [func for func, _ in simulated.seen]


def test_other_devices_keep_their_attention():
    query, key, value = (heads(4, 20, 16) for _ in range(3))
    assert torch.equal(cpu_attention_kernel()(query, key, value), F.scaled_dot_product_attention(query, key, value))
