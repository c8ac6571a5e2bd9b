"""What a conversation takes: base, adapters, the cache of keys and values, the process; and how much longer it may become."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.adapted import Adapted
from qlora.chatting.conversation import Conversation
from qlora.hardware.host import host_memory
from qlora.units import format_bytes

if TYPE_CHECKING:
    import torch

_RESERVE = 0.9  # of what is free: an allocator cannot use the last of it, and others want some as well


@dataclass(frozen=True)
class ChatMemory:
    """Bytes, counted now.

    Attributes:
        base: of the base's tensors on the device; `host`: of those that are in RAM beside a GPU; `streamed`: of layers that
            come to the device in turns.
        adapters: by name.
        tokens: of the last prompt and its answer; `cache` is what their keys and values took, `token` one token's.
        room: tokens that the conversation may grow by, the answer included; `limit` is what the model takes in all.
        process: RAM of this program; `free` is what is left on the device, `allocated` and `reserved` what torch has on a GPU.
    """

    base: int
    host: int
    streamed: int
    adapters: dict[str, int]
    tokens: int
    token: int
    cache: int
    room: int
    limit: int
    process: int
    free: int
    allocated: int | None = None
    reserved: int | None = None


def measure_memory(conversation: Conversation) -> ChatMemory:
    """Count what is there."""
    import psutil

    adapted, model = conversation.adapted, conversation.adapted.model
    config = model.config.get_text_config()
    base, host, adapters = _weights(adapted)
    last, element = conversation.last, _element_bytes(conversation)
    tokens = last.num_prompt_tokens + last.num_tokens if last else 0
    cache = cache_bytes_at(config, tokens, element)
    token = cache_bytes_at(config, 1, element)
    if last and last.cache_bytes:  # what was there, also of kinds of layers that the formula does not know
        cache, token = last.cache_bytes, last.cache_bytes // max(1, tokens - 1)  # the last token is not read
    free, allocated, reserved = _free(adapted)
    # Reading a prompt also takes some vectors for each token: what an MLP holds at once, and the hidden states around it.
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    reading = (3 * width + 6 * config.hidden_size) * element
    fitting = int(max(0, free * _RESERVE - cache - reading * tokens) // max(1, token + reading))
    room = min(max(0, conversation.limit - tokens), fitting)
    return ChatMemory(
        base=base, host=host, streamed=getattr(adapted.engine.stream, "streamed_bytes", 0), adapters=adapters, tokens=tokens,
        token=token, cache=cache, room=room, limit=conversation.limit, process=psutil.Process().memory_info().rss, free=free,
        allocated=allocated, reserved=reserved,
    )


def memory_lines(conversation: Conversation) -> list[str]:
    """The same for people, a line each."""
    found, device = measure_memory(conversation), conversation.adapted.device
    on_gpu = device.kind == "cuda"
    base = format_bytes(found.base) + (f" on the GPU, {format_bytes(found.host)} in RAM" if found.host else "")
    if found.streamed:
        base += f"; {format_bytes(found.streamed)} more in layers that come in turns"
    lines = [("base", base), *((f"adapter {name}", format_bytes(size)) for name, size in found.adapters.items())]
    lines.append(("conversation", f"{found.tokens:,} tokens; keys and values take {format_bytes(found.cache)} while it answers, "
                                  f"{_small(found.token)} a token"))
    limit = f" (the model takes {found.limit:,} in all)" if found.limit < sys.maxsize else ""
    lines.append(("room", f"about {found.room:,} more tokens, answers included{limit}"))
    process = f"{format_bytes(found.process)} of RAM"
    if on_gpu:
        lines.append(("process", process))
        lines.append(("GPU", f"{format_bytes(found.allocated or 0)} in tensors, {format_bytes(found.reserved or 0)} held by "
                             f"torch, {format_bytes(found.free)} free of {format_bytes(device.memory_bytes)}"))
    else:
        lines.append(("process", f"{process}; {format_bytes(found.free)} free of {format_bytes(device.memory_bytes)}"))
    width = max(len(what) for what, _ in lines)
    return [f"{what:{width}}  {text}" for what, text in lines]


def cache_bytes_at(config: Any, num_tokens: int, element_bytes: int) -> int:
    """Keys and values of so many tokens of one conversation: 2 x key-value heads x head size x bytes x tokens, of each layer;
    one with a sliding window keeps no more than that many (less one) tokens.

    Args:
        config: of the language model; what transformers calls its text config.
    """
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    of_token = 2 * (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim * element_bytes
    kinds: Sequence[str] = getattr(config, "layer_types", None) or (
        ["sliding_attention" if _slides(config) else "full_attention"] * config.num_hidden_layers)
    window = getattr(config, "sliding_window", None) or num_tokens + 1
    tokens = [min(num_tokens, window - 1) if kind == "sliding_attention" else num_tokens for kind in kinds]
    return of_token * sum(tokens)


# --- details -----------------------------------------------------------------------------------------------------------


def _slides(config: Any) -> bool:
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def _element_bytes(conversation: Conversation) -> int:
    """Of a key or value: they have the type that is computed in."""
    from qlora.precision import torch_dtype

    return torch_dtype(conversation.adapted.precision.compute).itemsize


def _weights(adapted: Adapted) -> tuple[int, int, dict[str, int]]:
    """Bytes of the base on the device and beside it, and of each adapter; what shares memory is counted once."""
    names = dict(zip(adapted.adapters, adapted.model.peft_config, strict=True))  # both in the order of loading
    device, host, seen = 0, 0, set[int]()
    adapters = dict.fromkeys(adapted.adapters, 0)
    stream = [("", block) for block in adapted.engine.stream.blocks]
    for name, tensor in [*_tensors(adapted.model), *stream]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or not storage.nbytes() or tensor.device.type == "meta":
            continue
        seen.add(storage.data_ptr())
        owner = next((mine for mine, theirs in names.items() if "lora_" in name and theirs in name.split(".")), None)
        if owner is not None:
            adapters[owner] += storage.nbytes()
        elif tensor.device.type == adapted.device.kind:
            device += storage.nbytes()
        else:
            host += storage.nbytes()
    return device, host, adapters


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and buffers, and the scales that 4-bit weights have beside them."""
    import torch

    yield from model.named_buffers()
    for name, parameter in model.named_parameters():
        yield name, parameter.data
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                yield from ((name, value) for value in vars(part).values() if isinstance(value, torch.Tensor))


def _free(adapted: Adapted) -> tuple[int, int | None, int | None]:
    """Bytes that can still be had; on a GPU also what torch's tensors take, and what it holds in all."""
    if adapted.device.kind != "cuda":
        return host_memory()[1], None, None
    import torch

    free, _ = torch.cuda.mem_get_info(0)
    allocated, reserved = torch.cuda.memory_allocated(0), torch.cuda.memory_reserved(0)
    free += reserved - allocated
    if adapted.plan.budget_bytes is not None:
        free = min(free, adapted.plan.budget_bytes - adapted.plan.context_bytes - allocated)
    return max(0, free), allocated, reserved


def _small(size_bytes: int) -> str:
    return f"{size_bytes:,} bytes" if size_bytes < 10 * 2**10 else format_bytes(size_bytes)
