"""What the memory engine may do for a run, from nothing to all it can, in the order in which a plan tries it.

What leaves results as they are and costs no time comes first; what needs RAM or a disk beside the device comes after what does not.
What a person has set is set in all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qlora.engine.placement import PROJECTIONS, Placement
from qlora.errors import RecipeError
from qlora.units import MIB, parse_size

if TYPE_CHECKING:
    from qlora.recipe import Recipe

_LOSS_CHUNK, _SMALL_LOSS_CHUNK = 128 * MIB, 16 * MIB
_MLP_TILE = 1024  # tokens; products of so many rows keep a GPU busy


def placements_for(
    recipe: Recipe, *, on_gpu: bool, tied_embeddings: bool, num_layers: int, streamable: bool, stream_from: str,
    scaled_loss: bool = False,
) -> tuple[Placement, ...]:
    """The placements that a recipe allows, the one that changes least first.

    Args:
        streamable: the model's layers can be brought to the device one by one.
        stream_from: what `auto` stands for.
        scaled_loss: fp16 scales its gradients, which torch does on one device alone: adapters cannot be on another.

    Raises:
        RecipeError: settings that contradict each other.
    """
    memory = recipe.memory
    _refuse_contradictions(recipe, num_layers, streamable, scaled_loss)
    host_table = {} if tied_embeddings else {"embedding_device": "host"}
    offload = {"offload_activations": on_gpu}
    # On a CPU our loss is faster too: TRL's takes three products with the head there, one of them in fp32, and ours two in 16 bits.
    # So are projections whose backward pass is written by hand, by fewer operators (scripts/compare, scripts/profile_step.py).
    start = Placement() if on_gpu else Placement(loss_chunk_bytes=_LOSS_CHUNK, fused_lora=PROJECTIONS)
    fused = replace(start, fused_lora=True)
    thrifty = replace(fused, loss_chunk_bytes=_LOSS_CHUNK, **offload)
    found = [start, fused, thrifty, replace(thrifty, **host_table)]
    streaming = replace(start, resident_layers=0, **offload, **host_table)
    least = replace(
        streaming, fused_lora=True, loss_chunk_bytes=_SMALL_LOSS_CHUNK, mlp_tile_tokens=_MLP_TILE, embedding_device="host",
        head_format="streamed",
    )
    if streamable and memory.streaming is not False:
        found += [streaming, replace(streaming, fused_lora=True, loss_chunk_bytes=_LOSS_CHUNK), least]
        found += [replace(least, offload_adapters=True)] if not scaled_loss else []
    wants_streaming = memory.streaming is True or (memory.resident_layers != "auto" and memory.resident_layers < num_layers)
    if wants_streaming:
        found = [each for each in found if each.streams]
    given = [_as_given(each, recipe, stream_from) for each in found]
    return tuple(dict.fromkeys(given))


def residents_for(recipe: Recipe, num_layers: int) -> tuple[int, ...]:
    """Numbers of layers that may stay on the device while the others are streamed."""
    wanted = recipe.memory.resident_layers
    return tuple(range(num_layers)) if wanted == "auto" else (wanted,)


def _as_given(placement: Placement, recipe: Recipe, stream_from: str) -> Placement:
    """With what a person has set."""
    memory = recipe.memory
    changes = {name: value for name in ("embedding_device", "head_format", "offload_activations", "offload_adapters", "fused_lora",
                                        "dequantise_once") if (value := getattr(memory, name)) != "auto"}
    if placement.streams and memory.resident_layers != "auto":
        changes["resident_layers"] = memory.resident_layers
    if placement.streams and memory.visit_micro_batches != "auto":
        changes["visit_micro_batches"] = memory.visit_micro_batches
    if memory.mlp_tile != "auto":
        changes["mlp_tile_tokens"] = None if memory.mlp_tile == "none" else memory.mlp_tile
    if memory.loss_chunk != "auto":
        changes["loss_chunk_bytes"] = None if memory.loss_chunk == "none" else parse_size(memory.loss_chunk)
    wanted = memory.stream_from if memory.stream_from != "auto" else stream_from
    placement = replace(placement, **changes, stream_from=wanted if placement.streams else "disk")
    if placement.head_format != "resident" and placement.loss_chunk_bytes is None and memory.loss_chunk == "auto":
        placement = replace(placement, loss_chunk_bytes=_LOSS_CHUNK)
    if memory.loss_chunk == "none" and memory.head_format == "auto":
        placement = replace(placement, head_format="resident")
    return placement


def _refuse_contradictions(recipe: Recipe, num_layers: int, streamable: bool, scaled_loss: bool) -> None:
    memory = recipe.memory
    wants = memory.streaming is True or (memory.resident_layers != "auto" and memory.resident_layers < num_layers)
    if memory.resident_layers != "auto" and memory.resident_layers > num_layers:
        raise RecipeError(f"memory.resident_layers is {memory.resident_layers}; {recipe.model.base} has {num_layers} layers.",
                          f"Write a number from 0 to {num_layers}, or leave it out.")
    if memory.streaming is False and memory.resident_layers not in ("auto", num_layers):
        raise RecipeError(f"memory.streaming is false, but memory.resident_layers is {memory.resident_layers} of {num_layers}.",
                          "Leave one of them out.")
    if wants and not streamable:
        raise RecipeError(f"The layers of {recipe.model.base} cannot be streamed: its weights are not of the plain 16-bit kind that "
                          "is quantised layer by layer (experts in one tensor, or quantised already).",
                          "Leave memory.streaming and memory.resident_layers out.")
    if memory.head_format not in ("auto", "resident") and memory.loss_chunk == "none":
        raise RecipeError(f"memory.head_format is {memory.head_format}, which TRL's loss cannot use.",
                          "Leave memory.loss_chunk out, or give it a size.")
    if memory.offload_adapters is True and scaled_loss:
        raise RecipeError("memory.offload_adapters is true, but fp16 scales its gradients on the card, and adapters must be there too.",
                          "Leave memory.offload_adapters out on this card.")
