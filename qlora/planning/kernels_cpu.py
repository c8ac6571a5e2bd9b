"""What CPU kernels take for themselves while they run, and which attention kernel a CPU takes.

On meta an operator has outputs and no inside, so the inside is listed here. Sizes were read from torch 2.13 and bitsandbytes
0.50 and agree with torch's profiler to the byte, except for oneDNN's matmul (see `_matmul_blocks`);
`tests/test_cpu_truth.py` holds each entry, and whole training steps, against the profiler. fp32 matmuls run in MKL, which
takes its buffers by malloc: they are in no figure of torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora.planning.trace import Temporaries

aten = torch.ops.aten


def cpu_temporaries() -> Temporaries:
    """Bytes inside each operator that takes any, alive together with its outputs; for this machine's number of threads."""
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    bnb = torch.ops.bitsandbytes
    return {
        bnb.gemm_4bit.default: _gemm_4bit,
        bnb.quantize_4bit.default: lambda weight, *_, **__: quantising_bytes(weight.numel(), weight.dtype),
        bnb.optimizer_update_8bit_blockwise.default: _adam_8bit,
        bnb.optimizer_update_32bit.default: _adam_32bit,
        aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_attention_backward,
        aten.mm.default: _matmul,
        aten.mm.out: _matmul,
        aten.bmm.default: _matmul,
        aten.addmm.default: lambda bias, a, b, **_: _matmul(a, b),
        aten.baddbmm.default: lambda bias, a, b, **_: _matmul(a, b),
    }


def cpu_attention_kernel() -> Callable[..., torch.Tensor]:
    """Stands in for `torch.nn.functional.scaled_dot_product_attention` on meta: calls the operator that a CPU would pick.

    Source: torch, aten/src/ATen/native/transformers/sdp_utils_cpp.cpp, use_flash_attention_cpp; the mask as in
    attention.cpp, convert_boolean_attn_mask.
    """
    composed = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:
        on_meta = query.is_meta and key.is_meta and value.is_meta
        if not on_meta or dropout_p > 0 or not _flash_applies(query, key, value, attn_mask, enable_gqa):
            return composed(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            low, zero = (torch.empty((), dtype=query.dtype, device="meta") for _ in range(2))
            attn_mask = torch.where(attn_mask, zero, low)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    return attention


def quantising_bytes(num_weights: int, dtype: torch.dtype) -> Sequence[int]:
    """What making an NF4 weight takes beside it: the weight in fp32, scaled, as indices in int32, and those in 8 bits.

    Source: bitsandbytes, backends/default/ops.py, quantize_4bit; there is no kernel for CPUs.
    """
    in_fp32 = 0 if dtype == torch.float32 else 4 * num_weights
    return [in_fp32, 4 * num_weights, 4 * num_weights, num_weights, num_weights // 2]


# --- attention ---------------------------------------------------------------------------------------------------------


def _flash_applies(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, enable_gqa: bool
) -> bool:
    if not query.ndim == key.ndim == value.ndim == 4:
        return False
    same_batch = query.shape[0] == key.shape[0] == value.shape[0]
    if enable_gqa:
        same_heads = query.shape[1] % key.shape[1] == 0 and query.shape[1] % value.shape[1] == 0
    else:
        same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    same_width = query.shape[-1] == key.shape[-1] == value.shape[-1]
    dense = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    return same_batch and same_heads and same_width and dense and query.shape[2] * key.shape[2] > 0 and (
        mask is None or _mask_fits(mask, query, key)
    )


def _mask_fits(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    wanted = *query.shape[:3], key.shape[2]
    return mask.ndim in (2, 4) and not mask.requires_grad and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(wanted))
    )


def _split(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """Rows of queries and of keys in a thread's block: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp."""
    rows = query.shape[2]
    block = 256 if rows >= 768 else 64 if rows >= 192 else 32
    return min(block, rows), min(512, key.shape[2])


def _flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Sequence[int]:
    """`buf` (scores, their maxima and sums, the output) in fp32, and `buf_reduced` (scores) in 16 bit, for each thread."""
    rows, columns = _split(query, key)
    exact = 4 * (rows * columns + 2 * rows + rows * query.shape[3])
    reduced = query.element_size() * rows * columns if query.element_size() == 2 else 0
    return [torch.get_num_threads() * exact, torch.get_num_threads() * reduced]


def _flash_attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any
) -> Sequence[int]:
    """Scores and their gradients, row sums, the gradient made contiguous, and the blocks of the matmuls in between.

    Row sums and blocks are taken by each thread for itself: torch's profiler sees those of the calling thread only.
    """
    rows, columns = _split(query, key)
    threads = torch.get_num_threads()
    heads_last = grad.transpose(1, 2).is_contiguous()
    copied = 0 if heads_last else grad.numel() * grad.element_size()
    if query.element_size() == 4:
        return [threads * 8 * rows * columns, threads * 4 * rows, copied]
    width, blocks = query.shape[3], 0
    if _onednn_multiplies(query):  # queries by keys, scores by keys, transposed scores by gradients; one after the other
        blocks = max(_matmul_blocks(rows, width, columns), _matmul_blocks(rows, columns, width),
                     _matmul_blocks(columns, rows, width, copied=True))
    return [threads * 8 * rows * columns, threads * 4 * rows * columns, threads * 4 * rows, copied, blocks]


# --- matrix products ---------------------------------------------------------------------------------------------------


def _gemm_4bit(
    activations: torch.Tensor, weight: torch.Tensor, shape: Sequence[int], absmax: torch.Tensor, blocksize: int,
    quant_type: str, bias: torch.Tensor | None = None, absmax_8bit: torch.Tensor | None = None, *_: Any, **__: Any,
) -> Sequence[int]:
    """The whole weight, dequantised, its scales in fp32, and the product's own: bitsandbytes, backends/default/ops.py."""
    num_out, num_in = shape
    scales = 0 if absmax_8bit is None else 4 * absmax_8bit.numel()
    num_rows = activations.numel() // num_in
    blocks = _matmul_blocks(num_rows, num_in, num_out) if _onednn_multiplies(activations) else 0
    return [num_out * num_in * activations.element_size(), scales, blocks]


def _matmul(a: torch.Tensor, b: torch.Tensor, **_: Any) -> Sequence[int]:
    """oneDNN's blocks, and a copy of an operand that is neither contiguous nor the transpose of something contiguous."""
    if not _onednn_multiplies(a):
        return []
    (num_rows, num_inner), num_columns, batch = a.shape[-2:], b.shape[-1], math.prod(a.shape[:-2])
    if batch * num_rows * num_inner * num_columns <= 16**3:  # too small to be worth it: ATen/native/mkldnn/Matmul.cpp
        return []
    copies = [0 if _is_dense(each) else each.numel() * each.element_size() for each in (a, b)]
    transposed = a.stride(-1) != 1 and not copies[0]
    return [*copies, _matmul_blocks(num_rows, num_inner, num_columns, copied=transposed, batch=batch)]


def _matmul_blocks(num_rows: int, num_inner: int, num_columns: int, *, copied: bool = False, batch: int = 1) -> int:
    """Bytes that oneDNN's blocked 16-bit matmul takes: blocks of the product in fp32, of B and, where A lies badly, of A.

    Sizes of blocks are those of oneDNN 3, src/cpu/x64/matmul/brgemm_matmul_utils.cpp, for a processor with AVX512-BF16. With
    one thread they agree with torch's profiler to the byte for most products. Elsewhere they are high, never low: oneDNN
    takes blocks of fewer rows where that shares the work more evenly among the threads.

    Args:
        copied: A is read in columns. Rows that lie a multiple of 8 KiB apart are copied too, because they would all fall
            into the same lines of the cache.
    """
    threads, rows, columns = torch.get_num_threads(), min(256, num_rows), min(64, num_columns)
    column_blocks = math.ceil(num_columns / 64)
    far_apart = num_rows >= 1024 and num_inner % 4096 == 0
    inner = min(math.ceil(num_inner / 32) * 32, 1024 if num_inner > 1024 and not copied else 512)
    product, lines = 4 * rows * columns, 0
    if copied or far_apart:
        lines = 2 * rows * (inner + 32 if inner >= 512 else inner)
        if num_inner > inner:  # sums wait for the next block of A, for several blocks of columns
            product *= min(16, column_blocks)
    power_of_2 = num_inner & (num_inner - 1) == 0
    if copied and batch == 1 and threads > column_blocks and num_inner >= 2048 and power_of_2:
        # Too few columns for all threads: each sums a part of the inner dimension, for the whole product.
        product = max(product, 4 * num_rows * num_columns)
    return threads * (product + 2 * inner * 64 + lines + 640) + (512 if lines else 384)


def _onednn_multiplies(operand: torch.Tensor) -> bool:
    if operand.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return operand.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or tensor.transpose(-1, -2).is_contiguous()


# --- optimizers --------------------------------------------------------------------------------------------------------


def _adam_8bit(name: str, gradient: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Sequence[int]:
    """In fp32: both moments, the gradient, the denominator and its square root, and a 16-bit weight.

    Source: bitsandbytes, backends/cpu/ops.py, _optimizer_update_8bit_blockwise_cpu.
    """
    return [4 * weight.numel() * (5 if weight.dtype == torch.float32 else 6)]


def _adam_32bit(name: str, gradient: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Sequence[int]:
    """In fp32: the gradient, two steps of the update, and a 16-bit weight; small matrices of an 8-bit optimizer too."""
    return [4 * weight.numel() * (3 if weight.dtype == torch.float32 else 4)]
