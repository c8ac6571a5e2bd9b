"""What stands in for CUDA on meta: which operator a card would run, and what that keeps in memory."""

import pytest
import torch

from qlora.planning.allocator import live_peaks
from qlora.planning.kernels import (
    attention_kernel, cublas_workspace_bytes, cuda_functions, cuda_temporaries, dropout, softmax,
)
from qlora.planning.trace import Recorder

T4, A100, RTX_3090, RTX_4090, H100, RTX_5090 = (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)
FLASH = "aten._scaled_dot_product_flash_attention"
EFFICIENT = "aten._scaled_dot_product_efficient_attention"


def heads(num_heads=4, tokens=256, size=64, dtype=torch.bfloat16):
    return torch.empty(2, num_heads, tokens, size, dtype=dtype, device="meta", requires_grad=True)


def attend(capability, query, key, value, **options):
    """The operators of a forward and a backward pass that took memory, with bytes, in order."""
    recorder = Recorder("meta", cuda_temporaries(capability))
    for tensor in (query, key, value):
        recorder.track(tensor, "activations")
    with recorder:
        out = attention_kernel(capability)(query, key, value, **options)
        out.sum().backward()
    assert out.shape == (*query.shape[:-1], value.shape[-1])
    return [(event.op, event.size_bytes) for event in recorder.trace() if event.size_bytes > 0]


def kernel(taken):
    """The fused kernel among them, or "math"."""
    names = {op.removesuffix(".default").removesuffix(" (inside)").removesuffix(".default").removesuffix("_backward")
             for op, _ in taken}
    return "flash" if FLASH in names else "efficient" if EFFICIENT in names else "math"


@pytest.mark.parametrize(("capability", "dtype", "expected"), [
    (T4, torch.float16, "efficient"), (T4, torch.float32, "efficient"), (T4, torch.bfloat16, "math"),
    (RTX_3090, torch.bfloat16, "flash"), (RTX_3090, torch.float32, "efficient"), (RTX_5090, torch.float16, "flash"),
])
def test_kernel_by_card_and_type(capability, dtype, expected):
    query = heads(dtype=dtype)
    assert kernel(attend(capability, query, heads(dtype=dtype), heads(dtype=dtype), is_causal=True)) == expected


def test_a_mask_rules_flash_out():
    mask = torch.empty(2, 1, 256, 256, dtype=torch.bool, device="meta")
    assert kernel(attend(RTX_3090, heads(), heads(), heads(), attn_mask=mask)) == "efficient"


def test_grouped_keys():
    query, key, value = heads(8), heads(2), heads(2)
    assert kernel(attend(RTX_3090, query, key, value, is_causal=True, enable_gqa=True)) == "flash"
    half = [heads(n, dtype=torch.float16) for n in (8, 2, 2)]
    taken = attend(T4, *half, is_causal=True, enable_gqa=True)
    # Nothing before Ampere takes them: all scores are stored, in fp32.
    assert kernel(taken) == "math" and max(size for _, size in taken) == 2 * 8 * 256 * 256 * 4


@pytest.mark.parametrize(("capability", "size", "expected"), [
    (A100, 256, "flash"), (A100, 512, "efficient"), (A100, 200, "flash"), (RTX_4090, 200, "efficient"),
    (RTX_4090, 256, "flash"), (RTX_5090, 224, "efficient"), (RTX_4090, 192, "flash"),
])
def test_head_sizes(capability, size, expected):
    query = heads(size=size)
    assert kernel(attend(capability, query, heads(size=size), heads(size=size), is_causal=True)) == expected


def test_odd_head_sizes_are_padded():
    taken = attend(A100, heads(size=60), heads(size=60), heads(size=60), is_causal=True)
    assert kernel(taken) == "flash"
    assert sum(op == "aten.constant_pad_nd.default" and size == 2 * 4 * 256 * 64 * 2 for op, size in taken) == 3
    assert kernel(attend(T4, *(heads(size=60, dtype=torch.float16) for _ in range(3)), is_causal=True)) == "math"


@pytest.mark.parametrize(("tokens", "padded"), [(256, False), (250, True)])
def test_masks_are_aligned(tokens, padded):
    mask = torch.empty(2, 1, tokens, tokens, dtype=torch.bool, device="meta")
    taken = attend(T4, *(heads(tokens=tokens, dtype=torch.float16) for _ in range(3)), attn_mask=mask)
    assert kernel(taken) == "efficient"
    assert ("aten.where.self", 2 * 2 * tokens * tokens) in taken  # as numbers, in the type of the query
    copies = [size for op, size in taken if op == "aten.constant_pad_nd.default"]
    assert copies == ([2 * 2 * tokens * 256] if padded else [])


def test_causal_flash_wants_as_many_keys_as_queries():
    query, key, value = heads(tokens=128), heads(), heads()
    assert kernel(attend(A100, query, key, value, is_causal=True)) == "efficient"
    assert kernel(attend(A100, query, key, value)) == "flash"


def test_wide_heads_sum_their_output_in_fp32():
    wide = [heads(size=512) for _ in range(3)]
    assert [size for op, size in attend(A100, *wide) if op == f"{EFFICIENT}.default (inside)"] == [2 * 4 * 256 * 512 * 4]


@pytest.mark.parametrize(("size", "padded"), [(72, 96), (136, 192)])
def test_flash_backward_rounds_head_sizes(size, padded):
    inside = [n for op, n in attend(A100, *(heads(size=size) for _ in range(3)), is_causal=True) if op.endswith("(inside)")]
    assert inside[-1] == 2 * 4 * 256 * padded * 4


def test_flash_backward_by_hand():
    # 2 rows, 8 heads, 250 tokens (256 in blocks of 128), head size 64; keys in 2 heads.
    taken = attend(RTX_3090, heads(8, 250), heads(2, 250), heads(2, 250), is_causal=True, enable_gqa=True)
    inside = [size for op, size in taken if op.endswith("(inside)")]
    softmax_d, dq, expanded = 2 * 8 * 256 * 4, 2 * 8 * 256 * 64 * 4, 2 * 8 * 250 * 64 * 2
    assert inside[-4:] == [softmax_d, dq, expanded, expanded]


def test_efficient_backward_by_hand():
    half = [heads(4, 256, dtype=torch.float16) for _ in range(3)]
    inside = [size for op, size in attend(T4, *half, is_causal=True) if op.endswith("(inside)")]
    delta, dq = 2 * 4 * 256 * 4, 2 * 4 * (256 // 64) * (64 * 64 + 4) * 4
    assert inside[-2:] == [delta, dq]


def test_softmax_reads_half_and_writes_float():
    def peak(function, dtype):
        scores = torch.empty(2, 4, 128, 128, dtype=dtype, device="meta")
        recorder = Recorder("meta")
        recorder.track(scores, "activations")
        with recorder:
            out = function(scores, dim=-1, dtype=torch.float32)
        assert out.dtype == torch.float32
        return live_peaks(recorder.trace())["train"]

    one = 2 * 4 * 128 * 128
    assert peak(softmax, torch.float16) == 6 * one
    assert peak(torch.nn.functional.softmax, torch.float16) == 10 * one  # with a copy of the scores in fp32
    assert peak(softmax, torch.bfloat16) == 10 * one  # CUDA does not fuse this one either


def test_dropout_keeps_booleans():
    hidden = torch.empty(2, 100, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    recorder = Recorder("meta")
    with recorder:
        out = dropout(hidden, 0.1, training=True)
        kept = sum(event.size_bytes for event in recorder.trace())
        del out
    assert kept == 2 * 100 * 64 * (2 + 1)
    assert dropout(hidden, 0.0) is hidden and dropout(hidden, 0.5, training=False) is hidden


def test_softmax_backward_takes_a_product():
    scores = torch.empty(2, 64, 64, device="meta", requires_grad=True)
    recorder = Recorder("meta", cuda_temporaries(T4))
    with recorder:
        softmax(scores, dim=-1).sum().backward()
    assert [e.size_bytes for e in recorder.trace() if "(inside)" in e.op and e.size_bytes > 0] == [2 * 64 * 64 * 4]


@pytest.mark.parametrize(("rows", "nested", "expected"), [
    (4, True, []), (5, True, [4 * 512, 4 * 512, 128 * 256 * 2]), (5, False, [128 * 256 * 2]),
])
def test_four_bit_weights_are_dequantised(rows, nested, expected):
    import bitsandbytes as bnb

    from qlora.model.meta import give_nf4_weight

    layer = bnb.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.bfloat16, device="meta")
    give_nf4_weight(layer, torch.bfloat16, double_quant=nested)
    recorder = Recorder("meta", cuda_temporaries(RTX_3090))
    with recorder, torch.no_grad():
        layer(torch.empty(rows, 256, dtype=torch.bfloat16, device="meta"))
    assert [e.size_bytes for e in recorder.trace() if "(inside)" in e.op and e.size_bytes > 0] == expected


def test_cublas_workspaces():
    assert [cublas_workspace_bytes(card) for card in (T4, RTX_3090, RTX_4090)] == [8_519_680] * 3
    assert [cublas_workspace_bytes(card) for card in (H100, RTX_5090)] == [2**25] * 2


def test_functions_are_those_of_torch():
    import inspect

    for name, function in cuda_functions(T4).items():
        theirs = getattr(torch.nn.functional, name)
        if name != "scaled_dot_product_attention":  # built in, without a signature
            assert list(inspect.signature(function).parameters) == list(inspect.signature(theirs).parameters)
