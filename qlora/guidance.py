"""Rules of thumb for rank, alpha and learning rate, as data; every value that they give names the rule behind it.

Order where rules disagree: the default band of the rank, then memory, data, task and model size. LoRA itself:
h = W x + (alpha / r) B A x, https://arxiv.org/abs/2106.09685. Raising alpha by a factor is raising the learning rate of
the adapters by about that factor, so the two are chosen together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora.errors import RecipeError
from qlora.units import GIB, format_bytes, format_count

DEFAULT_RANKS = (16, 64)  # smallest and largest rank chosen unasked
LAST_RESORT_RANKS = (8, 4)  # only where nothing else fits
SMALL_DATA = 1_000  # examples
LEARNING_RATE_BAND = (2e-4, 5e-4)  # of lr x alpha / r
FINE_STEP = 0.2  # of a learning rate that is tried next: 10 to 20 %
SWEEP_RANKS = (4, 8, 16, 32)  # in this order, until doubling no longer pays; then SWEEP_POLICIES, then SWEEP_TARGETS
SWEEP_POLICIES = ("conservative", "standard", "aggressive")
SWEEP_TARGETS = ("qv", "attention", "all")
SWEEP_GAIN = 0.01  # nats a token, 1 % of perplexity: what pays has to gain more, and more than the noise

ALPHA_POLICIES = {
    "conservative": (1, "small or sensitive data, or the first run on a model"),
    "standard": (2, "what most published recipes use"),
    "aggressive": (4, "more than 10,000 examples, and a model that was seen to be stable"),
}

# What to change when a run goes wrong, first thing first; the monitor and the report quote these.
ADVICE = {
    "unstable": "The loss swings or grows: set lora.alpha to r, or lower train.learning_rate by 10 to 20 %.",
    "slow": "The loss falls too slowly: double lora.alpha, or raise train.learning_rate within its band.",
    "weak": "Not good enough: double lora.r, then adapt more projections (lora.targets), then raise lora.alpha.",
    "overfitting": "The held-out loss rises: keep the best weights, train for fewer epochs, or lower lora.r.",
    "dead": "Adapters do not learn: bring train.learning_rate into its band, or adapt only projections that get a gradient.",
    "out_of_memory": "Out of memory: lower train.micro_batch, then data.max_length, then lora.r, then lora.targets.",
}


@dataclass(frozen=True)
class Choice:
    """A value with the reason for it, one line, and the name of the rule that decided."""

    value: Any
    reason: str
    rule: str


@dataclass(frozen=True)
class _Band:
    """Ranks from `low` to `high` for what lies below `limit` (exclusive)."""

    limit: float
    low: int
    high: int
    label: str


RANKS_BY_TASK = {
    "pattern": (1, 4, "yes/no, sentiment, a single pattern"),
    "short": (4, 8, "short answers or summaries, translation between near languages"),
    "complex": (8, 16, "complex questions, long summaries, simple code"),
    "reasoning": (16, 32, "creative writing, reasoning, several steps"),
    "expert": (32, 64, "expert writing, many domains"),
}
_RANKS_BY_EXAMPLES = (
    _Band(SMALL_DATA, 4, 8, "under 1,000"),
    _Band(10_000, 8, 16, "1,000 to 10,000"),
    _Band(100_000, 16, 32, "10,000 to 100,000"),
    _Band(math.inf, 32, 64, "over 100,000"),
)
_RANKS_BY_PARAMETERS = (
    _Band(1e9, 4, 16, "under 1B"),
    _Band(7e9, 16, 32, "1B to 7B"),
    _Band(30e9, 32, 64, "7B to 30B"),
    _Band(math.inf, 64, 128, "over 30B"),
)
# A card shows less than it is sold with (24 GB: 23.5 GiB; 8 GB: 7.6 GiB), so each class starts 7 % below its name.
_NOMINAL = 0.93
_RANKS_BY_MEMORY = (
    _Band(8 * GIB * _NOMINAL, 4, 8, "4 GB cards"),
    _Band(12 * GIB * _NOMINAL, 8, 16, "8 GB cards"),
    _Band(24 * GIB * _NOMINAL, 16, 32, "12 GB cards"),
    _Band(math.inf, 32, 64, "cards of 24 GB and more"),
)


def choose_rank(
    num_examples: int | None,
    num_parameters: int,
    vram_bytes: int | None,
    task: Literal["pattern", "short", "complex", "reasoning", "expert"] | None = None,
) -> Choice:
    """The rank for a run, from 16 to 64.

    Each rule narrows what the earlier ones left, and the largest rank that remains is taken: rank takes little memory
    (r 32 -> 64 on a 3B is 0.24 GiB in PEFT's comparison of methods), and alpha = r keeps it stable. Memory only sets an
    upper end: more of it never lowers the rank. Where a rule lies outside of what is left, the nearest rank stands.

    Args:
        num_examples: training rows, None if unknown.
        vram_bytes: memory of the device, None for no limit.
        task: a key of RANKS_BY_TASK, if it is known.
    """
    low, high = DEFAULT_RANKS
    decided = Choice(high, f"the largest rank of the default band {low} to {high}", "default band")
    rules = []
    if vram_bytes is not None:
        band = _find(_RANKS_BY_MEMORY, vram_bytes)
        reason = f"{format_bytes(vram_bytes)}, the class of {band.label} ({_span(band)})"
        rules.append(("rank by memory", 1, band.high, reason))
    if num_examples is not None:
        band = _find(_RANKS_BY_EXAMPLES, num_examples)
        reason = f"{num_examples:,} examples, {band.label} ({_span(band)})"
        rules.append(("rank by examples", band.low, band.high, reason))
    if task is not None:
        task_low, task_high, label = RANKS_BY_TASK[task]
        rules.append(("rank by task", task_low, task_high, f"{label} (r {task_low} to {task_high})"))
    band = _find(_RANKS_BY_PARAMETERS, num_parameters)
    reason = f"{format_count(num_parameters)} parameters, {band.label} ({_span(band)})"
    rules.append(("rank by model size", band.low, band.high, reason))
    for rule, rule_low, rule_high, reason in rules:
        low, new_high = min(high, max(low, rule_low)), max(low, min(high, rule_high))
        if new_high < high:
            short = f"; not under {DEFAULT_RANKS[0]} by default" if rule_high < new_high else ""
            decided = Choice(new_high, reason + short, rule)
        high = new_high
    return decided


def offer_smaller_rank(num_examples: int | None, r: int) -> Choice | None:
    """The rank to try instead, for data so small that `r` can overfit; None where there is nothing to say."""
    band = _RANKS_BY_EXAMPLES[0]
    if num_examples is None or num_examples >= SMALL_DATA or r <= band.high:
        return None
    return Choice(
        band.high,
        f"{num_examples:,} examples are few for r = {r}: it can learn them by heart. lora.r={band.high} is the rank "
        f"for {band.label}; watch the validation loss.",
        "rank by examples",
    )


def last_resort_rank(r: int) -> Choice | None:
    """The next rank below the default band, for when nothing else fits; None when there is none left."""
    smaller = next((rank for rank in LAST_RESORT_RANKS if rank < r), None)
    if smaller is None:
        return None
    reason = f"r = {smaller}, under {DEFAULT_RANKS[0]}, because nothing larger fits; the adapters can learn less"
    return Choice(smaller, reason, "last resort")


def choose_alpha(policy: str | float, r: int) -> Choice:
    """Alpha from a policy ("auto" is conservative), or a number as it is. The adapters' output is scaled by alpha / r.

    Raises:
        RecipeError: an unknown policy.
    """
    if not isinstance(policy, str):
        return Choice(policy, f"as given; the adapters are scaled by alpha / r = {policy / r:g}", "given")
    name = "conservative" if policy == "auto" else policy
    if name not in ALPHA_POLICIES:
        raise RecipeError(
            f"lora.alpha is {policy!r}.", f"It takes auto, {', '.join(ALPHA_POLICIES)} or a number above 0."
        )
    factor, when = ALPHA_POLICIES[name]
    times = "r" if factor == 1 else f"{factor}r"
    return Choice(factor * r, f"{name}: alpha = {times}, for {when}", f"alpha policy {name}")


def choose_learning_rate(r: int, alpha: float) -> Choice:
    """The learning rate whose effective value, lr x alpha / r, is at the careful end of the band."""
    low, high = LEARNING_RATE_BAND
    # Through six digits, so that 2e-4 stays 2e-4 and is not 0.00019999999999999998.
    value = float(f"{low * r / alpha:.6g}")
    reason = f"effective rate lr x alpha / r = {low:g}, the careful end of {low:g} to {high:g}"
    return Choice(value, reason, "learning-rate band")


def effective_learning_rate(learning_rate: float, r: int, alpha: float) -> float:
    """lr x alpha / r: what a change of alpha does to the pace of learning, seen as a learning rate."""
    return learning_rate * alpha / r


def check_learning_rate(learning_rate: float, r: int, alpha: float) -> Choice | None:
    """The rate to use instead, if the effective rate is out of the band; None where it is inside."""
    low, high = LEARNING_RATE_BAND
    effective = effective_learning_rate(learning_rate, r, alpha)
    if low * (1 - 1e-6) <= effective <= high * (1 + 1e-6):
        return None
    end, side, risk = (low, "under", "learn slowly") if effective < low else (high, "over", "diverge")
    value = float(f"{end * r / alpha:.6g}")
    return Choice(
        value,
        f"effective rate lr x alpha / r = {learning_rate:g} x {alpha:g} / {r} = {effective:.2g} is {side} the band "
        f"{low:g} to {high:g}, and the run may {risk}; train.learning_rate={value:g} is its nearest end.",
        "learning-rate band",
    )


def calmer(learning_rate: float, r: int, alpha: float, lower_by: float = FINE_STEP) -> dict[str, float]:
    """What to set where the loss swings or grows, see ADVICE: alpha to r where it is above; else a rate that is lower by this
    share. A rate that is over its band comes to its upper end.

    Alpha comes with the rate beside it, because one that is chosen for alpha would rise as that falls.
    """
    high = LEARNING_RATE_BAND[1]
    if alpha > r:
        return {"lora.alpha": r, "train.learning_rate": min(learning_rate, high)}
    return {"train.learning_rate": float(f"{min((1 - lower_by) * learning_rate, high * r / alpha):.6g}")}


def quicker(learning_rate: float, r: int, alpha: float) -> dict[str, float]:
    """What to set where the loss falls too slowly, see ADVICE: the rate to its band where it is under it; else twice the alpha,
    or a rate a fifth higher, as far as the band goes. Empty where it is at its end.
    """
    low, high = LEARNING_RATE_BAND
    effective = effective_learning_rate(learning_rate, r, alpha)
    if effective < low * (1 - 1e-6):
        return {"train.learning_rate": float(f"{low * r / alpha:.6g}")}
    if 2 * effective <= high * (1 + 1e-6):
        return {"lora.alpha": 2 * alpha, "train.learning_rate": learning_rate}
    if effective < high * (1 - 1e-6):
        return {"train.learning_rate": float(f"{min((1 + FINE_STEP) * learning_rate, high * r / alpha):.6g}")}
    return {}


def gain_pays(losses: Sequence[float], losses_with_more: Sequence[float]) -> Choice:
    """Whether more rank, alpha or targets pay: the mean gain in held-out loss must be above SWEEP_GAIN, and above its noise, two
    standard errors of the gains by seed. The same seed holds out the same rows, so that gains compare like with like.

    Args:
        losses, losses_with_more: mean nats a token, one of each seed, in the same order.
    """
    gains = [less - more for less, more in zip(losses, losses_with_more, strict=True)]
    gain, rule = statistics.fmean(gains), "gain above noise"
    noise = 2 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    over = f"{len(gains)} seeds" if len(gains) > 1 else "one seed, which is no evidence"
    if gain <= 0:
        return Choice(False, f"the loss rises by {-gain:.4f} (± {noise:.4f} over {over})", rule)
    said = f"the loss falls by {gain:.4f} (± {noise:.4f} over {over})"
    if gain <= SWEEP_GAIN:
        return Choice(False, f"{said}, not more than {SWEEP_GAIN:g}", rule)
    return Choice(False, f"{said}, within the noise", rule) if gain <= noise else Choice(True, said, rule)


def _find(bands: tuple[_Band, ...], amount: float) -> _Band:
    return next(band for band in bands if amount < band.limit)


def _span(band: _Band) -> str:
    return f"r {band.low} to {band.high}"
