"""The cells that are measured where nobody names others: for GPUs under caps of 4, 8, 12 and 24 GB, and small ones for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora.errors import RecipeError
from qlora.measuring.cells import Cell, choose_cells, parse_cells, read_cells
from qlora.measuring.child import device_of

# Under the sizes that cards are sold with. Where only the length is fixed, the planner chooses the rest; cells that fix all
# show that it is also right where it has no choice. Many need almost all of their budget, where a plan a little off shows,
# and a few need a little more than that, for --try-refused.
_CUDA = """
# 4 GB
HuggingFaceTB/SmolLM2-135M memory.budget=4GB data.max_length=2048 train.batch=4
HuggingFaceTB/SmolLM2-360M memory.budget=4GB data.max_length=1024 lora.r=32 train.micro_batch=2 train.accumulation=2
  memory.checkpointing=false train.optimizer=adamw
HuggingFaceTB/SmolLM2-1.7B memory.budget=4GB data.max_length=8192 train.batch=2
Qwen/Qwen3-0.6B memory.budget=4GB data.max_length=2048 train.batch=4
Qwen/Qwen3-0.6B memory.budget=4GB data.max_length=1024 lora.r=64 train.micro_batch=2 train.accumulation=2
  memory.checkpointing=true train.optimizer=adamw_8bit
Qwen/Qwen3-0.6B memory.budget=4GB data.max_length=2048 train.micro_batch=1 train.accumulation=4 model.dtype=fp16
  memory.checkpointing=true
Qwen/Qwen3-1.7B memory.budget=4GB data.max_length=7680 train.batch=2
Qwen/Qwen3-1.7B memory.budget=4GB data.max_length=2048 train.micro_batch=2 train.accumulation=2 memory.fused_lora=true
  memory.checkpointing=true
Qwen/Qwen3-4B memory.budget=4GB data.max_length=1024 lora.r=16 train.micro_batch=1 train.accumulation=4 memory.streaming=true
meta-llama/Llama-3.2-1B memory.budget=4GB data.max_length=11008 train.batch=2
meta-llama/Llama-3.2-1B memory.budget=4GB data.max_length=2048 lora.r=16 train.micro_batch=1 train.accumulation=2
  memory.checkpointing=true train.optimizer=paged_adamw_8bit
meta-llama/Llama-3.2-1B memory.budget=4GB data.max_length=1024 train.micro_batch=2 train.accumulation=2 data.packing=true
  memory.checkpointing=true
meta-llama/Llama-3.2-3B memory.budget=4GB data.max_length=512 train.batch=4
meta-llama/Llama-3.1-8B memory.budget=4GB data.max_length=1024 train.batch=4
google/gemma-3-1b-it memory.budget=4GB data.max_length=1024 train.batch=4
google/gemma-3-1b-it memory.budget=4GB data.max_length=10944 train.batch=2
google/gemma-3-1b-it memory.budget=4GB data.max_length=4096 train.micro_batch=1 train.accumulation=2 memory.loss_chunk=64MiB
mistralai/Mistral-7B-v0.3 memory.budget=4GB data.max_length=1024 train.batch=4

# 8 GB
Qwen/Qwen3-1.7B memory.budget=8GB data.max_length=4096 train.batch=2
HuggingFaceTB/SmolLM2-1.7B memory.budget=8GB data.max_length=2048 lora.r=64 train.batch=4
google/gemma-3-1b-it memory.budget=8GB data.max_length=1024 lora.r=16 train.micro_batch=2 train.accumulation=2
  memory.checkpointing=false train.optimizer=adamw
meta-llama/Llama-3.2-1B memory.budget=8GB data.max_length=1024 data.packing=true lora.r=32 train.batch=2
meta-llama/Llama-3.2-3B memory.budget=8GB data.max_length=2048 train.batch=4
Qwen/Qwen3-4B memory.budget=8GB data.max_length=11904 train.batch=2
Qwen/Qwen3-4B memory.budget=8GB data.max_length=2048 lora.r=16 train.micro_batch=4 train.accumulation=1
  memory.checkpointing=true memory.offload_activations=true
Qwen/Qwen3-4B memory.budget=8GB data.max_length=2048 train.micro_batch=1 train.accumulation=4 model.dtype=fp16
  memory.checkpointing=true
microsoft/Phi-4-mini-instruct memory.budget=8GB data.max_length=2048 train.batch=4
google/gemma-3-4b-it memory.budget=8GB data.max_length=9856 train.batch=2
mistralai/Mistral-7B-v0.3 memory.budget=8GB data.max_length=5760 train.batch=2
mistralai/Mistral-7B-v0.3 memory.budget=8GB data.max_length=2048 lora.r=32 train.micro_batch=1 train.accumulation=2
  memory.checkpointing=true train.optimizer=adamw_8bit
Qwen/Qwen3-8B memory.budget=8GB data.max_length=512 train.batch=4
Qwen/Qwen3-14B memory.budget=8GB data.max_length=1024 lora.r=16 train.micro_batch=1 train.accumulation=4
meta-llama/Llama-3.1-8B memory.budget=8GB data.max_length=1024 train.batch=4
meta-llama/Llama-3.1-8B memory.budget=8GB data.max_length=2880 train.batch=2
meta-llama/Llama-3.1-8B memory.budget=8GB data.max_length=3328 train.batch=2
meta-llama/Llama-3.1-8B memory.budget=8GB data.max_length=4096 lora.r=16 train.micro_batch=1 train.accumulation=2
  memory.checkpointing=true memory.fused_lora=true memory.loss_chunk=64MiB
meta-llama/Llama-3.1-8B memory.budget=8GB data.max_length=2048 lora.r=16 train.micro_batch=1 train.accumulation=4
  memory.streaming=true memory.resident_layers=16

# 12 GB
Qwen/Qwen3-4B memory.budget=12GB data.max_length=512 lora.r=64 train.micro_batch=2 train.accumulation=2
  memory.checkpointing=false train.optimizer=adamw
google/gemma-3-4b-it memory.budget=12GB data.max_length=2048 lora.r=32 train.micro_batch=4 train.accumulation=1
  memory.checkpointing=true train.optimizer=adamw_8bit
microsoft/Phi-4-mini-instruct memory.budget=12GB data.max_length=5248 lora.r=64 train.micro_batch=4 train.accumulation=1
  train.optimizer=paged_adamw_8bit
HuggingFaceTB/SmolLM3-3B memory.budget=12GB data.max_length=4096 train.batch=2
Qwen/Qwen3-8B memory.budget=12GB data.max_length=8704 train.batch=2
Qwen/Qwen3-8B memory.budget=12GB data.max_length=2048 lora.r=32 train.micro_batch=2 train.accumulation=2 data.packing=true
  memory.checkpointing=true
Qwen/Qwen3-14B memory.budget=12GB data.max_length=1024 train.batch=4
mistralai/Mistral-7B-v0.3 memory.budget=12GB data.max_length=2048 lora.r=32 train.micro_batch=2 train.accumulation=2
  model.dtype=fp16 memory.checkpointing=true
google/gemma-3-12b-it memory.budget=12GB data.max_length=1024 train.batch=4
meta-llama/Llama-3.1-8B memory.budget=12GB data.max_length=2048 lora.r=16 lora.targets=attention train.batch=4
meta-llama/Llama-3.1-8B memory.budget=12GB data.max_length=9984 train.batch=2
meta-llama/Llama-3.1-8B memory.budget=12GB data.max_length=11520 train.batch=2
meta-llama/Llama-3.1-8B memory.budget=12GB data.max_length=16384 train.micro_batch=1 train.accumulation=1
  memory.checkpointing=true memory.offload_activations=true

# 24 GB
Qwen/Qwen3-4B memory.budget=24GB data.max_length=3712 lora.r=16 train.micro_batch=1 train.accumulation=2
  memory.checkpointing=false train.optimizer=adamw
meta-llama/Llama-3.2-3B memory.budget=24GB data.max_length=8192 train.batch=2
mistralai/Mistral-7B-v0.3 memory.budget=24GB data.max_length=2944 lora.r=64 train.micro_batch=1 train.accumulation=2
  memory.checkpointing=false train.optimizer=adamw
mistralai/Mistral-Small-24B-Instruct-2501 memory.budget=24GB data.max_length=1024 train.batch=4
google/gemma-3-4b-it memory.budget=24GB data.max_length=8192 lora.r=64 train.micro_batch=4 train.accumulation=1
  memory.checkpointing=true train.optimizer=adamw
google/gemma-3-12b-it memory.budget=24GB data.max_length=4096 train.batch=2
Qwen/Qwen3-8B memory.budget=24GB data.max_length=4096 lora.r=64 train.batch=2
meta-llama/Llama-3.1-8B memory.budget=24GB data.max_length=7680 lora.r=64 train.micro_batch=4 train.accumulation=1
  memory.checkpointing=true train.optimizer=adamw
meta-llama/Llama-3.1-8B memory.budget=24GB data.max_length=4096 train.micro_batch=2 train.accumulation=2 model.attention=eager
  memory.checkpointing=true
Qwen/Qwen3-14B memory.budget=24GB data.max_length=15872 train.batch=2
Qwen/Qwen3-14B memory.budget=24GB data.max_length=4096 lora.r=64 train.micro_batch=2 train.accumulation=2 data.packing=true
  memory.checkpointing=true train.optimizer=paged_adamw_8bit
Qwen/Qwen3-32B memory.budget=24GB data.max_length=1024 train.batch=4
"""
_CPU = """
small:llama memory.budget=90MB data.max_length=256 train.batch=4
small:llama memory.budget=400MB data.max_length=256 lora.r=32 train.micro_batch=2 train.accumulation=2
  memory.checkpointing=false train.optimizer=adamw
small:llama:8x512 memory.budget=120MB data.max_length=256 lora.r=16 train.micro_batch=1 train.accumulation=2
  memory.streaming=true memory.resident_layers=2
small:mistral memory.budget=200MB data.max_length=256 lora.r=16 train.micro_batch=2 train.accumulation=2
  memory.checkpointing=true memory.fused_lora=true
small:mistral memory.budget=200MB data.max_length=512 lora.r=16 train.micro_batch=1 train.accumulation=2 model.dtype=fp32
  memory.checkpointing=true
small:qwen3 memory.budget=120MB data.max_length=256 train.batch=4
small:qwen3 memory.budget=200MB data.max_length=512 lora.r=16 train.micro_batch=1 train.accumulation=2 data.packing=true
  memory.checkpointing=true train.optimizer=adamw_8bit
small:qwen3 memory.budget=200MB data.max_length=512 lora.r=8 train.micro_batch=1 train.accumulation=2
  memory.checkpointing=true memory.loss_chunk=4MiB
small:gemma2 memory.budget=120MB data.max_length=256 train.batch=4
small:gemma2 memory.budget=60MB data.max_length=256 train.batch=4
small:gpt2 memory.budget=80MB data.max_length=256 train.batch=4
small:llama memory.budget=400MB data.max_length=512 lora.r=16 train.micro_batch=1 train.accumulation=2 memory.loss_chunk=none
small:qwen3 memory.budget=200MB data.max_length=256 lora.r=32 train.micro_batch=2 train.accumulation=2 memory.loss_chunk=none
  train.optimizer=adamw_8bit memory.checkpointing=false
small:gemma2 memory.budget=200MB data.max_length=256 lora.r=16 train.micro_batch=1 train.accumulation=2 memory.loss_chunk=none
small:phi3 memory.budget=60MB data.max_length=256 train.batch=4
small:phi3 memory.budget=100MB data.max_length=256 lora.r=16 train.micro_batch=2 train.accumulation=2 model.attention=eager
  memory.checkpointing=true
"""


def default_cells(kind: str) -> list[Cell]:
    """Those of a device of this kind, "cuda" or "cpu"."""
    return parse_cells(_CUDA if kind == "cuda" else _CPU)


def cells_for(
    words: Sequence[str] = (), file: str | None = None, sizes_bytes: Sequence[int] | None = None, *, plan_only: bool = False,
    cpu: bool = False,
) -> tuple[list[Cell], bool]:
    """The cells that are asked for, and whether they are for this machine's device; otherwise for cards that need not be here.

    Args:
        words: of one cell. file: of cells. sizes_bytes: budgets of default cells. At most one of the three is given.
        cpu: leave a GPU alone.

    Raises:
        RecipeError: they contradict each other or the device, or are no cells.
    """
    given = [name for name, value in (("A cell", words), ("--cells", file), ("--vram", sizes_bytes)) if value]
    if len(given) > 1:
        raise RecipeError(f"{given[0]} and {given[1]} both say what to measure.", "Leave one out.")
    if words:
        return [Cell.parse(" ".join(words))], True
    if file:
        return read_cells(Path(file)), True
    device = device_of(cpu, None)
    if sizes_bytes is None or (device.kind == "cuda" and not (plan_only and max(sizes_bytes) > device.memory_bytes)):
        return choose_cells(default_cells(device.kind), sizes_bytes, device.memory_bytes), True
    if not plan_only:
        raise RecipeError("--vram chooses cells for a GPU, and here they would run on the CPU.",
                          "Leave it out for the CPU's own cells, or add --plan-only, which needs no card.")
    return choose_cells(default_cells("cuda"), sizes_bytes, max(sizes_bytes)), False
