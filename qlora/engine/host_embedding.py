"""The input embedding looked up in host memory: a table of a gigabyte stays off the device, and a few megabytes of rows go to it.

A lookup reads only the rows that a batch asks for, so the table may be a view of a mapped file of which little is ever in memory.
The module's own forward does the lookup, whatever it does besides (Gemma scales what it finds), so results are the same to the
last bit: a copy changes nothing, and a product of two 16-bit numbers is rounded alike on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel


def embed_on_host(
    model: PeftModel, table: torch.Tensor | None, device: torch.device | str, let_go: Callable[[], None] = lambda: None
) -> None:
    """Look tokens up in host memory from now on, and send what is found to the device.

    Where head and embedding are one weight, the head's goes with it: call `qlora.engine.head.make_head` afterwards. Positions
    that a model learns (GPT-2) stay on the device. Asking for token numbers waits for the device, once a batch; numbers that are
    in host memory already are taken from there.

    Args:
        table: of shape (tokens, width) in the type of the model's own; None moves that one. It may be read-only. On meta it is
            not counted by a recorder that is entered later, because no operator returns it; what is looked up is.
        device: where the model's layers compute.
        let_go: called after each lookup; see `qlora.engine.store.BaseStore.let_go`.

    Raises:
        AssertionError: the table is not of the embedding's shape or type.
    """
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    if table is None:
        table = weight.data if weight.is_meta else weight.data.to("cpu")
    assert table.shape == weight.shape and table.dtype == weight.dtype, (
        f"a table of {tuple(table.shape)} in {table.dtype} for an embedding of {tuple(weight.shape)} in {weight.dtype}"
    )
    # A model is taken to be where its first parameter is (transformers' `device`), and generation brings its inputs there: so where
    # table and device differ, the table is the weight only while it is looked into.
    elsewhere = torch.device(device).type not in ("meta", table.device.type)
    away = torch.empty(0, dtype=table.dtype, device=device) if elsewhere else None
    weight.data = table if away is None else away
    if not table.is_meta:
        for name, buffer in embedding.named_buffers(recurse=False):
            setattr(embedding, name, buffer.to("cpu"))  # Gemma's scale

    def fetch_numbers(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        embedding.weight.data = table
        home = table.device
        return tuple(_to(value, home) for value in args), {name: _to(value, home) for name, value in kwargs.items()}

    def send_rows(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if away is not None:
            embedding.weight.data = away
        let_go()
        return output.to(device)

    embedding.register_forward_pre_hook(fetch_numbers, prepend=True, with_kwargs=True)
    # First of all: a hook that makes the output ask for gradients (checkpointing with adapters) would else have the gradient
    # carried back to host memory, where nothing needs it.
    embedding.register_forward_hook(send_rows, prepend=True)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
