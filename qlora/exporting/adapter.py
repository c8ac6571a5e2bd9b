"""The adapter alone as GGUF, which llama.cpp and Ollama put on a base in GGUF when they load it.

The form: tensors NAME.lora_a (r, in) and NAME.lora_b (out, r) with the base's names, and one alpha for all, by which each product
is scaled as alpha / r (llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp). Ranks and alphas of single modules, and
rsLoRA's root, go into B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora.errors import ModelError
from qlora.exporting.checking import prompt_ids
from qlora.exporting.families import Family, head_order, name_of
from qlora.exporting.metadata import Field
from qlora.exporting.reading import GgufFile
from qlora.exporting.writing import Entry
from qlora.merging.checking import Agreement, agree, load_plain, run, stream
from qlora.merging.parts import Parts
from qlora.merging.shards import read_rows

if TYPE_CHECKING:
    from qlora.merging.adapter import Product

# Largest |error| of a read-back product, as a share of its largest number: of both factors' rounding, with room for sums.
MAX_SHARE = {"F32": 1e-5, "F16": 3e-3, "BF16": 3e-2}


@dataclass(frozen=True)
class Half:
    """One product and its place in the file."""

    module: str
    name: str
    product: Product
    order: torch.Tensor | None
    factor: float  # into B, so that alpha / r is the same for all

    def b(self) -> torch.Tensor:
        """B as the file has it, in fp32."""
        found = read_rows(self.product.b).float() * self.factor
        return found if self.order is None else found[self.order]


@dataclass(frozen=True)
class AdapterCheck:
    """An adapter that was read back, against the one that was written.

    Attributes:
        share: the largest error of a product, as a share of the product's largest number; `worst` names its module.
        agreement: of the base with one and with the other, on the same prompts.
        kl_of_adapter: mean KL(adapter || base).
    """

    share: float
    worst: str
    num_products: int
    num_positions: int
    agreement: Agreement
    kl_of_adapter: float
    limit: float

    @property
    def passes(self) -> bool:
        return self.share <= self.limit


def halves_of(parts: Parts, family: Family) -> tuple[list[Half], float]:
    """The products with their places, and the alpha of the file.

    Raises:
        ModelError: the adapter holds more than products, or one that has no place.
    """
    if parts.files.replaced:
        raise ModelError(f"The adapter holds {min(parts.files.replaced)} whole, for which an adapter in GGUF has no place.",
                         "Export the merged model: leave --adapter-only out.")
    products = parts.files.products
    rank = next(iter(products.values())).a.shape[0]
    alpha = next(iter(products.values())).scaling * rank
    found = []
    for module, product in products.items():
        name = name_of(parts.adapter.base, parts.config, family, f"{module}.weight")
        if name == "token_embd.weight":
            raise ModelError("The adapter changes the embedding, which is not written as an adapter in GGUF here.",
                             "Export the merged model: leave --adapter-only out.")
        order = head_order(parts.config, family, f"{module}.weight", product.b.shape[0])
        found.append(Half(module, name, product, order, product.scaling * product.a.shape[0] / alpha))
    return found, alpha


def header(alpha: float, name: str, base: str) -> list[Field]:
    return [Field("general.type", "adapter", "str"), Field("adapter.type", "lora", "str"),
            Field("adapter.lora.alpha", float(alpha), "f32"), Field("general.name", name, "str"),
            Field("general.base_model.count", 1, "u32"), Field("general.base_model.0.name", base, "str")]


def entries_of(halves: Sequence[Half], kind: str) -> list[Entry]:
    """Args: kind: F32, F16 or BF16."""
    def rows(make: Callable[[], torch.Tensor]) -> Callable[[], Iterator[torch.Tensor]]:
        return lambda: iter([make()])

    entries = []
    for half in halves:
        a, b = half.product.a, half.product.b
        entries.append(Entry(f"{half.name}.lora_a", a.shape, kind, rows(lambda a=a: read_rows(a).float())))
        entries.append(Entry(f"{half.name}.lora_b", b.shape, kind, rows(half.b)))
    return entries


def check_adapter(
    path: Path, parts: Parts, halves: Sequence[Half], *, kind: str, loaded_bytes: int, progress: Callable[[int, int], None]
) -> AdapterCheck:
    """Rebuild every product from the file, and run the base with it."""
    from peft import PeftModel

    file = GgufFile(path)
    alpha = file.values["adapter.lora.alpha"]
    share, worst = 0.0, ""
    for half in halves:
        a, b = file.tensor(f"{half.name}.lora_a"), file.tensor(f"{half.name}.lora_b")
        wanted = half.product.delta(transposed=False, rows=slice(None))
        wanted = wanted if half.order is None else wanted[half.order]
        found = (b @ a) * (alpha / b.shape[1])
        error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not error <= share:
            share, worst = error if error == error else float("inf"), half.module
    progress(1, 3)
    ids = prompt_ids(parts)
    base = (load_plain(parts.folder, parts.config) if 4 * parts.num_numbers <= loaded_bytes
            else stream(parts.folder, parts.config, {}, parts.trained))
    model = PeftModel.from_pretrained(base, str(parts.adapter.folder), torch_device="cpu", low_cpu_mem_usage=True).eval()
    before = run(model, ids)
    progress(2, 3)
    with model.disable_adapter():
        without = run(model, ids)
    for half in halves:
        layer = model.get_base_model().get_submodule(half.module)
        a, b = file.tensor(f"{half.name}.lora_a"), file.tensor(f"{half.name}.lora_b")
        b = b if half.order is None else b[half.order.argsort()]
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b * (alpha / b.shape[1] / layer.scaling["default"]))
    after = run(model, ids)
    progress(3, 3)
    return AdapterCheck(share, worst, len(halves), ids.numel(), agree(before, after), agree(before, without).kl, MAX_SHARE[kind])
