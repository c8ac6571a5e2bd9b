"""What CUDA kernels do with memory that a step on meta tensors does not show.

Two kinds of facts, each with the file it was read in (torch 2.13 unless said otherwise):

- Buffers that a kernel takes for itself while it runs: `cuda_temporaries`, for `qlora.planning.trace.Recorder`.
- Functions for which torch takes another operator on CUDA than elsewhere: `cuda_functions`, to stand in for those of
  torch.nn.functional while a CUDA device is simulated.

Where a kernel's choice hangs on what is not known here (number of multiprocessors, shared memory), the larger buffer is
assumed. Not modelled: scratch of a few MiB at most in reductions, sorting and split-key attention of single tokens, and
cuDNN's workspaces for convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from qlora.planning.trace import Temporaries

aten = torch.ops.aten
Capability = tuple[int, int]
_HALVES = (torch.float16, torch.bfloat16)


def cublas_workspace_bytes(capability: Capability) -> int:
    """What cuBLAS takes for each thread that multiplies: once for the forward pass's, once for autograd's.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: two buffers of 4 MiB and eight of 16 KiB;
    32 MiB on Hopper and Blackwell. Torch before 2.13 takes the smaller one on Blackwell.
    """
    return 2**25 if capability[0] >= 9 else 2 * 2**22 + 8 * 2**14


def cuda_temporaries(capability: Capability) -> Temporaries:
    """Sizes of the buffers inside kernels, by operator."""
    import bitsandbytes  # noqa: F401  (registers its operators)

    return {
        torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
        aten._softmax_backward_data.default: _softmax_backward,
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
        aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    }


def cuda_functions(capability: Capability) -> dict[str, Callable[..., torch.Tensor]]:
    """Stand-ins for functions of torch.nn.functional, by name."""
    return {"scaled_dot_product_attention": attention_kernel(capability), "softmax": softmax, "dropout": dropout}


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """CUDA reads fp16 scores and writes fp32 ones in one kernel; other devices make an fp32 copy first.

    Source: aten/src/ATen/native/SoftMax.cpp, softmax.
    """
    if input.dtype == torch.float16 and dtype == torch.float32:
        return aten._softmax.default(input, dim, True)
    return torch.softmax(input, dim, dtype=dtype)


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA keeps a mask of booleans; other devices keep the noise in the input's type.

    Source: aten/src/ATen/native/Dropout.cpp, is_fused_kernel_acceptable.
    """
    if not training or p == 0:
        return input
    return input.mul_(torch.empty_like(input)) if inplace else torch.native_dropout(input, p, True)[0]


def attention_kernel(capability: Capability) -> Callable[..., torch.Tensor]:
    """torch.nn.functional.scaled_dot_product_attention as CUDA would run it on such a card.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (can_use_flash_attention,
    can_use_mem_efficient_attention) and transformers/attention.cpp (scaled_dot_product_attention, preprocess_mask,
    pad_last_dim). The order is flash, memory-efficient, math. On Hopper and data-centre Blackwell torch prefers cuDNN's
    kernel, whose workspace is not published; the other two stand for it.

    Before torch 2.14 the memory-efficient kernel takes no grouped keys (https://github.com/pytorch/pytorch/pull/191085).
    So cards before Ampere run grouped-query attention without a mask on the math path, which stores all scores.
    """

    def scaled_dot_product_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if attn_mask is None and _flash_can(capability, query, key, value, needs_grad, dropout_p, is_causal, enable_gqa):
            padded = [F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x for x in (query, key, value)]
            out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
            return out[..., : query.shape[-1]]
        bias = _as_bias(attn_mask, query.dtype)
        if _efficient_can(capability, query, key, value):
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, _aligned(bias, query, key), needs_grad, dropout_p, is_causal, scale=scale
            )[0]
        return aten._scaled_dot_product_attention_math(
            query, key, value, bias, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]

    return scaled_dot_product_attention


# --- which attention kernel --------------------------------------------------------------------------------------------


def _flash_can(
    capability: Capability, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, needs_grad: bool,
    dropout_p: float, is_causal: bool, enable_gqa: bool,
) -> bool:
    head_dim = query.shape[-1]
    if capability < (8, 0) or query.dtype not in _HALVES or not query.ndim == key.ndim == value.ndim == 4:
        return False
    if not head_dim == key.shape[-1] == value.shape[-1] <= 256:
        return False
    small_card = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    if needs_grad and small_card and (192 < head_dim <= 224 or (head_dim > 224 and dropout_p > 0)):
        return False
    if is_causal and query.shape[-2] != key.shape[-2]:
        return False
    return query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)


def _efficient_can(capability: Capability, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    if query.dtype == torch.bfloat16 and capability < (8, 0) or not query.ndim == key.ndim == value.ndim == 4:
        return False
    if query.dtype in _HALVES:
        alignment = 8 if capability >= (7, 0) else 1
    else:
        alignment = 4 if capability >= (8, 0) else 1
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    return (head_dim == key.shape[-1] and head_dim % alignment == value_dim % alignment == 0
            and query.shape[1] == key.shape[1] == value.shape[1])


def _as_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of booleans as the numbers that are added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask.logical_not(), float("-inf"), torch.zeros((), dtype=dtype, device=mask.device))


def _aligned(bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Rows of the bias must begin at multiples of 8 numbers; where they do not, torch copies it with padding."""
    if bias is None:
        return None
    if bias.stride(-1) != 1 or any(stride % 8 for stride in bias.stride()[:-1]):
        columns = bias.shape[-1]
        bias = F.pad(bias, (0, 8 - columns % 8))[..., :columns]
    return bias.expand(*query.shape[:-1], key.shape[-2])


# --- buffers inside kernels --------------------------------------------------------------------------------------------


def _gemm_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], absmax: torch.Tensor, blocksize: int, quant_type: str,
    bias: torch.Tensor | None = None, absmax_8bit: torch.Tensor | None = None, *rest: torch.Tensor | None,
    **named: torch.Tensor | None,
) -> list[int]:
    """The whole weight in 16 bits, and with double quantisation its scales in fp32, twice.

    Source: bitsandbytes 0.50.2, backends/cuda/ops.py, _dequant_linear_fallback. For up to 4 rows of A its fused kernel
    runs on every card. For 5 to 1536 rows a table of its own decides by card, number of multiprocessors and shape; here
    the weight is counted as if it always decided against the fused kernel.
    """
    out_features, in_features = shapeB
    if A.numel() <= 4 * in_features and in_features % blocksize == 0:
        return []
    scales = 0 if absmax_8bit is None else 4 * absmax_8bit.numel()
    return [scales, scales, out_features * in_features * A.element_size()]


def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype) -> list[int]:
    """`grad * output`. Source: aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out."""
    return [output.numel() * max(output.element_size(), grad.element_size())]


def _flash_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    *rest: object, **named: object,
) -> list[int]:
    """Source: transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: softmax_d, dq_accum, and dK and dV for every query head.

    `contiguous` copies: transformers/cuda/attention_backward.cu, _flash_attention_backward. Shapes (batch, heads, tokens,
    head size).
    """
    batch, heads, tokens, head_dim = query.shape
    padded_tokens, padded_dim = _round_up(tokens, 128), _round_up(head_dim, 32 if head_dim <= 128 else 64)
    sizes = [x.numel() * x.element_size() for x in (grad_out, out) if not x.transpose(1, 2).is_contiguous()]
    sizes += [4 * batch * heads * padded_tokens, 4 * batch * heads * padded_tokens * padded_dim]
    if key.shape[1] != heads:
        sizes += [batch * heads * key.shape[2] * head_dim * query.element_size()] * 2
    return sizes


def _efficient_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **named: object
) -> list[int]:
    """An fp32 sum of the output where a head is too wide for registers.

    Source: transformers/cuda/mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer; up to 128 columns fit.
    """
    wide = query.dtype in _HALVES and value.shape[-1] > 128
    return [4 * math.prod(query.shape[:3]) * value.shape[-1]] if wide else []


def _efficient_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **named: object
) -> list[int]:
    """Delta and the workspace: dQ in fp32 tiles; for 16-bit heads over 64 columns also parts of dK and dV.

    Source: transformers/cuda/attention_backward.cu, _efficient_attention_backward, and mem_eff_attention/
    kernel_backward.h, workspace_size, with tiles of 64 x 64 up to 64 columns and of 128 x 64 beyond. Which tiles a card
    takes hangs on its shared memory; the parts of dK and dV, which only small tiles need, are always counted. fp32 heads
    have dO * O in full for delta instead.
    """
    batch, heads, tokens, head_dim = query.shape
    rows = 64 if head_dim <= 64 else 128
    tiles = math.ceil(tokens / rows) * math.ceil(head_dim / 64)
    workspace = 4 * tiles * (rows * 64 + 4)
    sizes = [] if grad_out.transpose(1, 2).is_contiguous() else [grad_out.numel() * grad_out.element_size()]
    if query.dtype not in _HALVES:
        sizes.append(4 * grad_out.numel())
    elif head_dim > 64:
        splits = max(1, min(math.ceil(key.shape[2] / 64), 200 // (batch * heads)))
        workspace += 4 * splits * 64 * (_round_up(head_dim, 64) + _round_up(value.shape[-1], 64))
    return [*sizes, 4 * batch * heads * tokens, batch * heads * workspace]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
