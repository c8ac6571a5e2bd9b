"""What is measured: a model, and what is fixed of its settings; the planner decides the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.catalog import find_id
from qlora.errors import RecipeError
from qlora.recipe import build_recipe
from qlora.units import parse_size

NUM_STEPS = 2  # optimizer state is there from the second on
ALWAYS = ("model.weights=random", f"train.max_steps={NUM_STEPS}", "train.eval_every=0", "train.save_every=0")

# Small models that need no catalog, for machines without a GPU: wide enough that a step takes tens of MiB.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
                  vocab_size=4096, max_position_embeddings=4096),
    "mistral": dict(hidden_size=448, intermediate_size=1568, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
                    vocab_size=4096, max_position_embeddings=4096, sliding_window=None),
    "qwen3": dict(hidden_size=384, intermediate_size=1152, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                  head_dim=64, vocab_size=6144, max_position_embeddings=4096, tie_word_embeddings=True),
    "gemma2": dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=64, vocab_size=4096, max_position_embeddings=4096, sliding_window=128, query_pre_attn_scalar=64),
    "gpt2": dict(n_embd=384, n_layer=3, n_head=6, vocab_size=4096, n_positions=4096),
    "phi3": dict(hidden_size=320, intermediate_size=896, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
                 vocab_size=3200, max_position_embeddings=4096, original_max_position_embeddings=4096),
}
_SHAPE = re.compile(r"([1-9]\d{0,2})x([1-9]\d{1,4})")
_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: a Hub id of the catalog, a folder with config.json, or "small:llama" for a small one of that architecture;
            "small:llama:6x768" has so many layers, so wide.
        overrides: `section.setting=value`, memory.budget among them.
    """

    model: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Cell:
        """From a line such as "Qwen/Qwen3-8B memory.budget=8GB lora.r=16".

        Raises:
            RecipeError: the model is missing or there are two, there is no such small one, or a setting is none.
        """
        words = text.split()
        models = [word for word in words if "=" not in word]
        if len(models) != 1:
            raise RecipeError(f'"{text}" names {len(models)} models; a cell has one.',
                              "Write MODEL section.setting=value ..., such as Qwen/Qwen3-8B memory.budget=8GB lora.r=16")
        cell = cls(find_id(models[0]) or models[0], tuple(word for word in words if "=" in word))
        build_recipe(overrides=cell.overrides, model=cell.model, data="none")  # what is no setting is said now
        if cell.small is not None:
            small_config(cell.small)
        return cell

    def __str__(self) -> str:
        return " ".join((self.model, *self.overrides))

    @property
    def budget_bytes(self) -> int:
        """Of its memory.budget; 0 where it has none, and the device's own memory counts."""
        given = [word.partition("=")[2] for word in self.overrides if word.startswith("memory.budget=")]
        return parse_size(given[-1]) if given and given[-1] != "auto" else 0

    @property
    def small(self) -> str | None:
        """What stands behind "small:"; None for a model of the catalog or a folder."""
        kind, _, name = self.model.partition(":")
        return name if kind == "small" else None


def parse_cells(text: str) -> list[Cell]:
    """One cell a line. What follows a # is left out, and a line that begins with a space goes on with the one before.

    Raises:
        RecipeError: see `Cell.parse`.
    """
    lines: list[str] = []
    for line in text.splitlines():
        kept = line.partition("#")[0].rstrip()
        if kept[:1].isspace() and lines:
            lines[-1] += kept
        elif kept:
            lines.append(kept)
    return [Cell.parse(line) for line in lines]


def read_cells(path: Path) -> list[Cell]:
    """Raises: RecipeError: no such file, none in it, or a line that is no cell."""
    try:
        cells = parse_cells(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise RecipeError(f"{path} is no file of cells that can be read.",
                          "One cell a line; `qlora measure --help` shows one.") from None
    if not cells:
        raise RecipeError(f"There is no cell in {path}.", "One cell a line; `qlora measure --help` shows one.")
    return cells


def choose_cells(cells: Sequence[Cell], sizes_bytes: Sequence[int] | None, memory_bytes: int) -> list[Cell]:
    """Of the default cells, those under the budgets that are asked for, or under any that the device has.

    Args:
        sizes_bytes: budgets; None is any. `memory_bytes`: of the device.

    Raises:
        RecipeError: there is no cell under one of these budgets, or the device is smaller.
    """
    if sizes_bytes is None:
        return [cell for cell in cells if cell.budget_bytes <= memory_bytes * 1.1]
    known = sorted({cell.budget_bytes for cell in cells})
    for size in sizes_bytes:
        if size not in known:
            raise RecipeError(f"No default cell has a budget of {_gb(size)}.",
                              f"There are cells for {', '.join(map(_gb, known))}. "
                              f"For another: qlora measure MODEL memory.budget={_gb(size)}")
        if size > memory_bytes * 1.1:
            raise RecipeError(f"--vram asks for {_gb(size)}, and this device has {_gb(memory_bytes)}.",
                              "Leave that size out; --plan-only plans for it all the same.")
    return [cell for cell in cells if cell.budget_bytes in sizes_bytes]


def locate(cell: Cell, folder: Path) -> str:
    """model.base of a cell; the config of a small model is written into `folder`.

    Raises:
        RecipeError: there is no such small model.
    """
    if cell.small is None:
        return cell.model
    from transformers import AutoConfig

    name, values = small_config(cell.small)
    config = AutoConfig.for_model(name, bos_token_id=1, eos_token_id=1, pad_token_id=0, **values)
    config.save_pretrained(folder / name)
    return str(folder / name)


def small_config(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and config values of "llama" or "llama:6x768" (layers x width; heads are 64 wide).

    Raises:
        RecipeError: there is no such small model, or no model of that shape.
    """
    family, _, shape = name.partition(":")
    if family not in SMALL_MODELS:
        raise RecipeError(f"There is no small model {family!r}.",
                          f"There are {', '.join(f'small:{known}' for known in SMALL_MODELS)}.")
    values = SMALL_MODELS[family]
    if not shape:
        return family, values
    match = _SHAPE.fullmatch(shape)
    if match is None or int(match[2]) % _HEAD_WIDTH or "num_key_value_heads" not in values:
        raise RecipeError(f"small:{name} is no shape that a small model has.",
                          f"Write layers x width, a multiple of {_HEAD_WIDTH}: small:llama:6x768.")
    layers, width = int(match[1]), int(match[2])
    heads = width // _HEAD_WIDTH
    return family, {
        **values, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads, "intermediate_size": width * 11 // 4 // 32 * 32,
    }


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g}GB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.3g}MB"
