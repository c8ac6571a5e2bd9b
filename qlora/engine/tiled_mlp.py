"""MLPs a tile of tokens at a time, so that what they hold inside is that of one tile, forward and backward.

The forward pass keeps the input alone; the backward pass runs each tile again. Gradients of adapters are summed over the tiles,
in fp32. Products over fewer tokens may be rounded in another way, and sums over tokens are made in parts, so in bf16 results
are close to those without tiles, not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from qlora.engine.fused import replace_forward
from qlora.engine.fused_mlp import Gradients, Mlp, MlpForward
from qlora.engine.lora_product import autocast_dtype
from qlora.engine.mlp_forms import mlp_form
from qlora.engine.renormalise import keep, kept, plain_forward

if TYPE_CHECKING:
    from peft import PeftModel


def install_tiled_mlp(model: PeftModel, tile_tokens: int) -> list[str]:
    """Make every MLP of a model work on tiles of at most so many tokens; after `install_fused`, whose passes then work on tiles,
    or without it. `remove_fused` takes it away.

    Returns:
        What was left alone and why, a line for each reason.

    Raises:
        AssertionError: the MLPs are tiled already.
    """
    assert tile_tokens > 0, tile_tokens
    num_random = 0
    for module in model.modules():
        if mlp_form(module) is None:
            continue
        if any(isinstance(child, torch.nn.Dropout) and child.p > 0 for child in module.modules()):
            num_random += 1  # it would draw other numbers when it is run again
            continue
        replace_forward(module, _TiledForward(module, tile_tokens))
    return [f"{num_random} MLPs are not tiled: they have dropout."] if num_random else []


def tiles(shape: torch.Size, tile_tokens: int) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor of this shape, (..., tokens, width), of at most so many tokens: several rows of the batch where they are
    short, parts of a row where they are long. A row is cut in the same places whatever rows are beside it.
    """
    if len(shape) != 3:
        yield from ((slice(start, start + tile_tokens),) for start in range(0, shape[0], tile_tokens))
        return
    num_rows, num_tokens, _ = shape
    at_once = max(1, tile_tokens // max(1, num_tokens))
    for row in range(0, num_rows, at_once):
        for start in range(0, num_tokens, tile_tokens):
            yield slice(row, row + at_once), slice(start, start + tile_tokens)


def _shown(parts: Iterable[tuple[slice, ...]], x: torch.Tensor) -> Iterable[tuple[slice, ...]]:
    """All of them; on meta two, because one takes what the next one takes."""
    return islice(parts, 2) if x.is_meta else parts


class _TiledForward:
    """What stands in for the forward of an MLP."""

    def __init__(self, module: torch.nn.Module, tile_tokens: int):
        self._module, self._tile_tokens = module, tile_tokens
        self._inner = module.__dict__.get("forward") or partial(plain_forward, module)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim not in (2, 3) or self._is_one_tile(x):
            return self._inner(x)
        mlp = self._inner.now(x) if isinstance(self._inner, MlpForward) else None
        if mlp is not None:
            return self._inner.finish(_Tiled.apply(x, _FusedTile(mlp), self._tile_tokens, *mlp.weights))
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        return _Tiled.apply(x, _PlainTile(self._inner, trained, x.device), self._tile_tokens, *trained)

    def _is_one_tile(self, x: torch.Tensor) -> bool:
        """Nothing is gained by tiles. A hand-written backward pass holds more at its highest than its forward pass leaves for it, so
        to run that again would cost two products of the MLP's nine and save nothing.
        """
        return x.numel() <= self._tile_tokens * x.shape[-1] and (not torch.is_grad_enabled() or isinstance(self._inner, MlpForward))


class _FusedTile:
    """A tile of an MLP with a backward pass of its own, which does not need down's forward again."""

    def __init__(self, mlp: Mlp):
        self._mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._mlp.outer(self._mlp.inner(x))

    def gradients(self, x: torch.Tensor, gradient: torch.Tensor, for_x: bool, wanted: list[bool]) -> Gradients:
        return self._mlp.gradients(x, self._mlp.inner(x), gradient, for_x, wanted)


class _PlainTile:
    """A tile of any MLP, by autograd, in mixed precision where the forward pass was in it."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], trained: list[torch.Tensor], device: torch.device):
        self.forward, self._trained, self._autocast = forward, trained, partial(_autocast, autocast_dtype(device), device)

    def gradients(self, x: torch.Tensor, gradient: torch.Tensor, for_x: bool, wanted: list[bool]) -> Gradients:
        with torch.enable_grad(), self._autocast():
            x = x.detach().requires_grad_()
            y = self.forward(x)
        return torch.autograd.grad(y, [x, *self._trained], gradient, allow_unused=True)


class _Tiled(torch.autograd.Function):
    """An MLP a tile at a time; x is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mlp: _FusedTile | _PlainTile, tile_tokens: int, *trained: torch.Tensor
    ) -> torch.Tensor:
        ctx.mlp, ctx.tile_tokens, ctx.dtypes = mlp, tile_tokens, [weight.dtype for weight in trained]
        keep(ctx, x)
        y = None
        for tile in _shown(tiles(x.shape, tile_tokens), x):
            part = mlp.forward(x[tile])
            if y is None:
                y = torch.empty(*x.shape[:-1], part.shape[-1], dtype=part.dtype, device=part.device)
            y[tile] = part
        return torch.empty_like(x) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        (x,) = kept(ctx)
        for_x, _, _, *wanted = ctx.needs_input_grad
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if for_x else None
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        for tile in _shown(tiles(x.shape, ctx.tile_tokens), x):
            of_x, *of_trained = ctx.mlp.gradients(x[tile], gradient[tile], for_x, wanted)
            if dx is not None:
                dx[tile] = of_x
            for i, one in enumerate(of_trained):
                if one is not None:
                    sums[i] = one.float() if sums[i] is None else sums[i].add_(one)
        return dx, None, None, *(None if one is None else one.to(dtype) for one, dtype in zip(sums, ctx.dtypes, strict=True))


def _autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """Mixed precision as it was in the forward pass; without its store of converted weights, which would outlive a tile."""
    if device.type == "meta":  # has none of its own; whoever simulates one is still there
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
