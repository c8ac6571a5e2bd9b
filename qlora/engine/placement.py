"""What the memory engine may do in a run: each a choice of its own, all of them off in a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.units import exact_size, parse_size


PROJECTIONS = "projections"


@dataclass(frozen=True)
class Placement:
    """Where the parts of a run live and how they are computed. The defaults are a plain run: all on the device.

    Attributes:
        resident_layers: layers whose weights stay on the device; the others are streamed. None: all of them, and no schedule.
        visit_micro_batches: micro-batches that go through a streamed layer in one visit; None is all of a step.
        stream_from: "ram" or "disk": where streamed layers come from.
        embedding_device: "device" or "host", where the input embedding is looked up.
        head_format: "resident", "streamed" (16-bit, tile by tile from the host), "int8" or "nf4" (on the device; not exact).
        loss_chunk_bytes: logits at once in the project's own chunked loss; None is TRL's loss. What is not a resident head needs it.
        offload_activations: checkpoints of activations wait in host memory.
        offload_adapters: adapters, their gradients and the optimizer live in host memory.
        fused_lora: hand-written backward pass of adapted projections, MLPs and norms; "projections" is of these alone.
        mlp_tile_tokens: tokens that go through an MLP at once; None is all.
        dequantise_once: a visited layer's weights are kept in 16 bits for all micro-batches of the visit.
    """

    resident_layers: int | None = None
    visit_micro_batches: int | None = None
    stream_from: str = "disk"
    embedding_device: str = "device"
    head_format: str = "resident"
    loss_chunk_bytes: int | None = None
    offload_activations: bool = False
    offload_adapters: bool = False
    fused_lora: bool | Literal["projections"] = False
    mlp_tile_tokens: int | None = None
    dequantise_once: bool = False

    @property
    def streams(self) -> bool:
        """Some layers do not live on the device."""
        return self.resident_layers is not None

    @property
    def schedules(self) -> bool:
        """Layers are visited by a schedule of the engine, which also recomputes activations, instead of by the model itself."""
        return self.streams or self.offload_activations or self.offload_adapters or self.dequantise_once

    @property
    def plain(self) -> bool:
        """Nothing of the engine is used."""
        return self == Placement()

    def to_settings(self, num_layers: int) -> dict[str, Any]:
        """Its values by the names of a recipe's settings, as a plan decides them."""
        resident = num_layers if self.resident_layers is None else self.resident_layers
        return {
            "memory.streaming": self.streams, "memory.resident_layers": resident, "memory.streamed_layers": num_layers - resident,
            "memory.visit_micro_batches": self.visit_micro_batches or "all",
            "memory.stream_from": self.stream_from, "memory.embedding_device": self.embedding_device,
            "memory.head_format": self.head_format, "memory.offload_activations": self.offload_activations,
            "memory.offload_adapters": self.offload_adapters, "memory.fused_lora": self.fused_lora,
            "memory.dequantise_once": self.dequantise_once, "memory.mlp_tile": self.mlp_tile_tokens or "none",
            "memory.loss_chunk": "none" if self.loss_chunk_bytes is None else exact_size(self.loss_chunk_bytes),
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Placement:
        """What `to_settings` wrote; of what is missing, and of what nobody has decided, the default."""
        def decided(name: str, default: Any) -> Any:
            value = settings.get(f"memory.{name}", "auto")
            return default if value == "auto" else value

        chunk, tile, visit = decided("loss_chunk", "none"), decided("mlp_tile", "none"), decided("visit_micro_batches", "all")
        return cls(
            resident_layers=decided("resident_layers", 0) if decided("streaming", False) else None,
            visit_micro_batches=None if visit == "all" else visit, stream_from=decided("stream_from", "disk"),
            embedding_device=decided("embedding_device", "device"),
            head_format=decided("head_format", "resident"), offload_activations=decided("offload_activations", False),
            offload_adapters=decided("offload_adapters", False), fused_lora=decided("fused_lora", False),
            dequantise_once=decided("dequantise_once", False), mlp_tile_tokens=None if tile == "none" else tile,
            loss_chunk_bytes=None if chunk == "none" else parse_size(chunk),
        )


def resident_numbers(num_layers: int, num_resident: int) -> list[int]:
    """Which layers stay, spread evenly among those that are streamed: while a resident one computes, the link can catch up."""
    return [n for n in range(num_layers) if (n + 1) * num_resident // num_layers > n * num_resident // num_layers]
