"""Cross entropy of a language model without its logits: they are made in chunks, and with them, at once, the gradient.

Only positions that are trained on go through the head. What has the size of logits never takes more than `chunk_bytes` together,
whatever the batch, as long as one row of them fits (seven in fp32 on CPUs).

A head that lies on the device as it is takes the positions chunk after chunk, each against the whole vocabulary. A softmax is
then complete when its chunk is, so the gradient follows in the forward pass, and a step takes two products of the head's size
instead of three (as Liger-Kernel's fused linear cross entropy does). Any other head comes in tiles, which are the outer loop, so
that a tile is fetched once for all positions: a first pass sums exponentials as they come (online softmax,
https://arxiv.org/abs/1805.02867), and a second, in the other direction, makes the gradient. That is summed over tiles in fp32,
since rounding each tile's part to 16 bits biases training (found by TRL, `trl/kernels/chunked_logprob.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qlora.engine.head import Head, rows_within

if TYPE_CHECKING:
    from peft import PeftModel

IGNORED = -100
# Gradients of logits lie between -1 and 1, and most are tiny. In fp16 they are made larger by this, so that fewer are lost below
# its smallest number, 6e-8; sums of products are in fp32 and far from 65,504.
_FP16_BOOST = 1024.0
# From four rows on, MKL's products in fp32 do not depend on how many there are (see `qlora.model.exact`).
_FEWEST_ROWS = 4
# Where a product of 16-bit tiles cannot be summed in fp32 as it is, so many rows of the tile at a time are turned into fp32.
_CONVERTED_ROWS = 256


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, chunk_bytes: int, softcap: float | None = None,
    scale: float = 1.0, divisor: torch.Tensor | int = 1,
) -> torch.Tensor:
    """The sum of -log p(target) over positions whose target is not -100, divided by `divisor`: a number in fp32. Only `hidden`
    gets a gradient.

    Logits are `softcap * tanh(scale * (hidden Wᵀ + bias) / softcap)`, without the cap where it is None. Products are in the
    head's type, all else is in fp32.

    Args:
        hidden: (n, H), in the order of tokens or any other. Of another type than the head's it is converted a chunk at a time.
        targets: (n,), int64.
        chunk_bytes: for what has the size of logits; where the head comes in tiles, as much again for two of these.
        divisor: a number of tokens. Given here, gradients are rounded once, after the division, not once more by the caller's.
    """
    loss, _ = _loss_and_correct(hidden, targets, _Job(head, chunk_bytes, softcap, scale, divisor))
    return loss


class LanguageModelLoss:
    """The loss of a causal language model, as `SFTTrainer` asks its own for it: next-token targets, ignored where -100.

    Attributes:
        head, chunk_bytes: see `chunked_cross_entropy`.
        last_correct, last_count: of the last call, targets that were the most probable token, and targets, as numbers on the
            device: their ratio is the token accuracy.
        most_trained: of a batch's positions, in a rehearsal on meta, where labels have no values; None is all.
    """

    def __init__(self, model: PeftModel, head: Head, chunk_bytes: int):
        self.head, self.chunk_bytes = head, chunk_bytes
        self.softcap, self.scale = logit_transform(model.config)
        self.last_correct: torch.Tensor | None = None
        self.last_count: torch.Tensor | None = None
        self.most_trained: int | None = None
        head.tile_rows = _tile_rows(head, chunk_bytes)  # so that generation takes the room that the loss has

    def __call__(
        self, model: PeftModel, inputs: Mapping[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the model without its head, and take the loss of what comes out.

        Args:
            model: with adapters; what runs is the backbone inside, under whatever autocast is on.
            inputs: of a batch as the collator makes it; `labels` of shape (rows, tokens).
            num_items_in_batch: tokens trained on in the whole step, by which the sum is divided; None takes this batch's.
        """
        return self.of_hidden(_last_hidden_states(model, inputs), inputs["labels"], num_items_in_batch)

    def of_rows(self, model: PeftModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The summed loss of each row by itself, (rows,) in fp64, without gradients; arguments as above."""
        with torch.no_grad():
            hidden, targets = _last_hidden_states(model, inputs), _next_tokens(inputs["labels"])
            positions = torch.arange(targets.numel(), device=targets.device)[targets.flatten() != IGNORED]
            job = _Job(self.head, self.chunk_bytes, self.softcap, self.scale, 1)
            losses, _ = _losses_and_hits(hidden.flatten(0, 1), targets.flatten(), positions, job, None)
            sums = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
            return sums.index_add_(0, positions // targets.shape[1], losses[:, 0].double())

    def of_hidden(
        self, hidden: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of a backbone's last hidden states, of shape (rows, tokens, H), and labels of shape (rows, tokens)."""
        targets = _next_tokens(labels)
        self.last_count = (targets != IGNORED).sum()
        divisor = self.last_count if num_items_in_batch is None else num_items_in_batch
        job = _Job(self.head, self.chunk_bytes, self.softcap, self.scale, divisor)
        loss, self.last_correct = _loss_and_correct(hidden.flatten(0, 1), targets.flatten(), job, self.most_trained)
        return loss


def _last_hidden_states(model: PeftModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """(rows, tokens, H), of the model without its head."""
    passed = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels", "num_items_in_batch")}
    return model.get_base_model().base_model(**{**passed, "use_cache": False}).last_hidden_state


def _next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Targets are moved and not the states, which stay one piece: the last of each row has none."""
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


def logit_transform(config: Any) -> tuple[float | None, float]:
    """What a model does to its logits: the cap (Gemma 2) and the factor before it (Cohere, Granite, Falcon-H1, ...).

    Source of the names: TRL 1.16, trainer/utils.py, add_fused_lm_head; each is what its model's own forward reads.
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return softcap, float(getattr(text, name))
    divided = getattr(text, "logits_scaling", None)
    if divided is None:
        return softcap, 1.0
    return softcap, float(divided if text.model_type == "hyperclovax" else 1 / divided)


# --- the function ------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """What a call is to do; see `chunked_cross_entropy`."""

    head: Head
    chunk_bytes: int
    softcap: float | None
    scale: float
    divisor: torch.Tensor | int

    @property
    def bytes_per_logit(self) -> int:
        """The product, unless it is fp32 already; the fp32 numbers it becomes; with a cap, its tanh beside them."""
        return (0 if self.head.dtype == torch.float32 else self.head.dtype.itemsize) + 4 + (0 if self.softcap is None else 4)

    @property
    def factor(self) -> torch.Tensor | float:
        """By which a summed gradient is multiplied at the end."""
        return 1.0 / (self.at_least_one * self.boost)

    @property
    def at_least_one(self) -> torch.Tensor | int:
        """The divisor; a batch without a token to train on has a loss of 0."""
        return self.divisor.clamp(min=1) if isinstance(self.divisor, torch.Tensor) else max(1, self.divisor)

    @property
    def boost(self) -> float:
        return _FP16_BOOST if self.head.dtype == torch.float16 else 1.0


def _loss_and_correct(
    hidden: torch.Tensor, targets: torch.Tensor, job: _Job, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and at how many positions the target is the most probable token (the first of those that are)."""
    # As numbers and not as a mask: a mask would be turned into them again at each use, and make the device wait each time.
    positions = torch.arange(len(targets), device=targets.device)[targets != IGNORED]
    if hidden.is_meta:
        positions = positions[:most]
    return _ChunkedLoss.apply(hidden if torch.is_grad_enabled() else hidden.detach(), targets, positions, job)


class _ChunkedLoss(torch.autograd.Function):
    """hidden (n, H), targets (n,), positions (m,) -> loss, correct."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, job: _Job
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = None
        if ctx.needs_input_grad[0]:
            # In fp16 a gradient may only be as small as the loss scale makes it, which comes with the backward pass.
            kept_in = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
            gradient = torch.zeros(hidden.shape, dtype=kept_in, device=hidden.device)
        with _no_autocast(hidden.device):
            losses, hits = _losses_and_hits(hidden, targets, positions, job, gradient)
            loss, correct = losses.sum(), hits.sum()
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(correct)
        return loss / job.at_least_one, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: there is one, and autograd refuses a second backward pass through what has changed.
        return gradient.mul_(loss_gradient).to(ctx.dtype), None, None, None


def _losses_and_hits(
    hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, job: _Job, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """At each position the loss, and whether the target is the most probable token: (positions, 1) both."""
    count = len(positions)
    with _no_autocast(hidden.device):
        if 0 < count < _fewest_rows(job.head, hidden.device):
            # The first one several times over: it comes out, and is written, the same each time.
            positions = torch.cat([positions, positions[:1].expand(_FEWEST_ROWS - count)])
        work_through = _by_positions if job.head.sliceable else _by_tiles
        losses, hits = work_through(hidden, targets[positions][:, None], positions, job, gradient)
    return losses[:count], hits[:count]


def _by_positions(
    hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, job: _Job, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of the vocabulary at once, for a chunk of positions after the other. Writes rows of `gradient`; targets, and the losses
    and hits that are returned, have shape (positions, 1).
    """
    head = job.head
    room = _Room(job, num_rows=len(positions), width=head.num_tokens, device=hidden.device)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    hits = torch.empty(targets.shape, dtype=torch.bool, device=hidden.device)
    for first, last in room.chunks:
        wanted = targets[first:last]
        logits, capped = room.logits(hidden.index_select(0, positions[first:last]), head.weight, head.bias)
        highest, best = logits.max(-1, keepdim=True)
        target_logit = logits.gather(-1, wanted)
        parts = logits.sub_(highest).exp_()
        total = parts.sum(-1, keepdim=True)
        losses[first:last] = total.log() + highest - target_logit
        hits[first:last] = best == wanted
        if gradient is not None:
            # softmax less one at the target, both still times the total
            parts.scatter_(-1, wanted, parts.gather(-1, wanted) - total)
            slopes = room.slopes(parts, capped, (job.boost * job.scale) / total)
            product = _product(slopes, head.weight).mul_(job.factor)
            gradient.index_copy_(0, positions[first:last], product.to(gradient.dtype))
    return losses, hits


def _by_tiles(
    hidden: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, job: _Job, gradient: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tile of the vocabulary after the other, for all positions; twice where a gradient is wanted. As `_by_positions`."""
    head, device = job.head, hidden.device
    tile_rows = _tile_rows(head, job.chunk_bytes)
    room = _Room(job, num_rows=len(positions), width=tile_rows, device=device)
    highest = torch.full(targets.shape, -torch.inf, dtype=torch.float32, device=device)
    total, target_logit = torch.zeros_like(highest), torch.zeros_like(highest)
    best = torch.zeros_like(targets)
    for first, tile in _shown(head.tiles(tile_rows), hidden):
        bias = None if head.bias is None else head.bias[first : first + len(tile)]
        for a, b in room.chunks:
            logits, _ = room.logits(hidden.index_select(0, positions[a:b]), tile, bias)
            local, inside = _local(targets[a:b], first, tile)
            target_logit[a:b] = torch.where(inside, logits.gather(-1, local), target_logit[a:b])
            tile_highest, tile_best = logits.max(-1, keepdim=True)
            best[a:b] = torch.where(tile_highest > highest[a:b], tile_best + first, best[a:b])
            raised = torch.maximum(highest[a:b], tile_highest)
            total[a:b] = total[a:b] * (highest[a:b] - raised).exp() + logits.sub_(raised).exp_().sum(-1, keepdim=True)
            highest[a:b] = raised
    if gradient is not None:
        summed = torch.zeros((len(positions), head.width), dtype=torch.float32, device=device)
        for first, tile in _shown(head.tiles(tile_rows, backwards=True), hidden):
            bias = None if head.bias is None else head.bias[first : first + len(tile)]
            for a, b in room.chunks:
                logits, capped = room.logits(hidden.index_select(0, positions[a:b]), tile, bias)
                local, inside = _local(targets[a:b], first, tile)
                parts = logits.sub_(highest[a:b]).exp_()
                at_target = parts.gather(-1, local)
                parts.scatter_(-1, local, torch.where(inside, at_target - total[a:b], at_target))
                slopes = room.slopes(parts, capped, (job.boost * job.scale) / total[a:b])
                _add_product(summed[a:b], slopes, tile)
        gradient.index_copy_(0, positions, summed.mul_(job.factor).to(gradient.dtype))
    return total.log() + highest - target_logit, best == targets


def _shown(tiles: Iterable[Any], hidden: torch.Tensor) -> Iterable[Any]:
    """All of them; on meta two, because one takes what the next one takes, and two show what they leave to each other."""
    return islice(tiles, 2) if hidden.is_meta else tiles


class _Room:
    """Memory for one chunk of logits, used again for each: (rows, width) numbers, as many rows as `chunk_bytes` has room for.

    Attributes:
        chunks: the first row and the one after the last, of each.
    """

    def __init__(self, job: _Job, *, num_rows: int, width: int, device: torch.device):
        self.job = job
        # From twice the fewest less one on, chunks that are as equal as can be are none of them smaller than the fewest.
        most = max(2 * _fewest_rows(job.head, device) - 1, job.chunk_bytes // (width * job.bytes_per_logit))
        number = -(-num_rows // most)
        shown = min(number, 2) if device.type == "meta" else number  # as `_shown` does it
        self.chunks = [(num_rows * i // number, num_rows * (i + 1) // number) for i in range(shown)]
        size = min(most, num_rows) * width

        def room(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._full = room(torch.float32)
        self._half = self._full if job.head.dtype == torch.float32 else room(job.head.dtype)
        self._capped = None if job.softcap is None else room(torch.float32)

    def logits(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of a chunk, in fp32, and with a cap the tanh that they are made from."""
        rows = rows.to(self.job.head.dtype)
        shape = len(rows), len(weight)
        product = _view(self._half, shape)
        if bias is None:
            torch.mm(rows, weight.t(), out=product)
        else:
            torch.addmm(bias, rows, weight.t(), out=product)
        logits = _view(self._full, shape)
        if logits.dtype != product.dtype:
            logits.copy_(product)
        if self.job.scale != 1.0:
            logits.mul_(self.job.scale)
        if self._capped is None:
            return logits, None
        capped = _view(self._capped, shape)
        torch.tanh(logits.div_(self.job.softcap), out=capped)
        return torch.mul(capped, self.job.softcap, out=logits), capped

    def slopes(self, parts: torch.Tensor, capped: torch.Tensor | None, factor: torch.Tensor) -> torch.Tensor:
        """The loss's gradient with respect to the product, in the head's type: `parts` times `factor`, a number a row, through
        the cap, whose slope is 1 - tanh².
        """
        if capped is not None:
            parts.mul_(capped.square_().neg_().add_(1.0))
        parts.mul_(factor)
        return parts if self._half is self._full else _view(self._half, parts.shape).copy_(parts)


def _view(room: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return room[: shape[0] * shape[1]].view(shape)


def _tile_rows(head: Head, chunk_bytes: int) -> int:
    """Of a tile that fits twice into a chunk's bytes. It depends on nothing else, so neither does the result."""
    return rows_within(head, chunk_bytes // 2)


def _fewest_rows(head: Head, device: torch.device) -> int:
    return _FEWEST_ROWS if device.type != "cuda" and head.dtype == torch.float32 else 1


def _local(targets: torch.Tensor, first: int, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the targets in a tile, and whether they are in it; those of the others are any."""
    local = targets - first
    return local.clamp(0, len(tile) - 1), (local >= 0) & (local < len(tile))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32; on CPUs a 16-bit product is rounded to 16 bits on the way."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b in fp32, without rounding a b to 16 bits."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        for first in range(0, len(b), _CONVERTED_ROWS):
            total.addmm_(a[:, first : first + _CONVERTED_ROWS].float(), b[first : first + _CONVERTED_ROWS].float())
            if a.is_meta:
                break  # the rest takes the same memory again


def _no_autocast(device: torch.device) -> AbstractContextManager:
    """Types are chosen here. Of autocast on meta nothing is changed: what is done here in fp32 it leaves alone."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
