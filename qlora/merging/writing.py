"""Write the merged model: one tensor at a time, of large ones some rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import durable
from qlora.engine.quantise import quantise_nf4
from qlora.errors import ModelError
from qlora.merging.base import SINGLE, Change
from qlora.merging.shards import PIECE, Outline, as_bytes, read_bytes, read_rows, row_pieces, split, torch_type, write_shard
from qlora.model.safe_files import INDEX
from qlora.precision import torch_dtype

if TYPE_CHECKING:
    import torch

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
              "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_FROM_BASE = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "LICENSE*", "NOTICE*", "USE_POLICY*")


def write_weights(
    folder: Path, changes: Sequence[Change], *, max_shard_bytes: int, trained: str, progress: Callable[[int, int], None]
) -> None:
    """Every tensor into shards; the index, where there are several, comes last.

    Args:
        trained: the type in which the base was quantised for training: bf16, fp16 or fp32.
        progress: told how many bytes are written, and of how many.

    Raises:
        ModelError: a number that is not finite, or does not fit the type it is to have.
        OSError: a file cannot be read or written.
    """
    of_outline = {change.outline.name: change for change in changes}
    done, total = 0, sum(change.outline.size_bytes for change in changes)

    def content(outline: Outline) -> Iterator[bytes | memoryview]:
        nonlocal done
        for block in merged_bytes(of_outline[outline.name], trained):
            yield block
            done += len(block)
            progress(done, total)

    shards = split([change.outline for change in changes], max_shard_bytes)
    if len(shards) == 1:
        write_shard(folder / SINGLE, shards[0], content)
        durable.sync_folder(folder)
        return
    places = {}
    for number, outlines in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, outlines, content)
        places.update({outline.name: name for outline in outlines})
    durable.sync_folder(folder)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    durable.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def copy_small_files(base: Path, adapter: Path, folder: Path, dtype: str | None) -> None:
    """Settings of the base, and tokenizer and chat template of the adapter; of the base where the adapter has none.

    Args:
        dtype: what config.json is to name; None leaves it as it is.

    Raises:
        OSError: a file cannot be read or written.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if dtype is None:
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        _name_type(config, dtype)
        durable.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    has_tokenizer = any(adapter.glob("tokenizer*")) or (adapter / "vocab.json").is_file()
    for source, patterns in ((base, _FROM_BASE), (adapter if has_tokenizer else base, _TOKENIZER)):
        for pattern in patterns:
            for path in source.glob(pattern):
                if path.is_file():
                    target = folder / path.relative_to(source)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)


def merged_bytes(change: Change, trained: str) -> Iterator[bytes | memoryview]:
    """What is written of a tensor, piece by piece."""
    if change.is_copy:
        yield from read_bytes(change.stored)
        return
    wanted = torch_type(change.outline.dtype)
    for piece in merged_rows(change, trained):
        written = piece.to(wanted)
        _refuse_non_finite(change, piece, written)
        yield as_bytes(written)


def merged_rows(change: Change, trained: str) -> Iterator[torch.Tensor]:
    """W + s B A in fp32 (fp64 where the base is), rows after rows, before it is rounded to what is written."""
    source = change.replaced or change.stored
    whole = nf4_values(read_rows(source), change.transposed, trained) if change.nf4 and change.replaced is None else None
    for first, count in row_pieces(source.shape):
        rows = read_rows(source, first, count) if whole is None else whole[first : first + count]
        rows = rows if source.dtype == "F64" else rows.float()
        if change.product is not None:
            rows = rows + change.product.delta(transposed=change.transposed, rows=slice(first, first + count))
        yield rows


def nf4_values(weight: torch.Tensor, transposed: bool, trained: str) -> torch.Tensor:
    """The numbers in fp32 that NF4 leaves of a matrix: quantised from the type that training had it in, and dequantised.

    Args:
        transposed: it has shape (in, out); training quantises it as (out, in).
    """
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    weight = weight.to(torch_dtype(trained))
    weight = weight.T.contiguous() if transposed else weight
    parts = quantise_nf4(weight, "cpu")
    scales = QuantState(absmax=parts[".nested_absmax"], code=parts[".nested_code"], blocksize=256, dtype=torch.float32)
    state = QuantState(absmax=parts[".absmax"], shape=weight.shape, code=get_4bit_type("nf4", device="cpu"), blocksize=64,
                       quant_type="nf4", dtype=torch.float32, offset=parts[".offset"], state2=scales)
    values = dequantize_4bit(parts[""], state)
    return values.T if transposed else values


def memory_bytes(changes: Sequence[Change]) -> int:
    """Host memory that writing takes at most, beside the libraries."""
    def of(change: Change) -> int:
        num_rows = min(change.stored.num_numbers, PIECE)
        need = 16 * num_rows  # as stored, in fp32, what is added, the sum, and the same as written
        if change.nf4:
            need += 12 * change.stored.num_numbers  # as stored, in the type of training, packed, and in fp32
        if change.product is not None:
            need += 6 * (change.product.a.num_numbers + change.product.b.num_numbers)
        return need

    return max((of(change) for change in changes if not change.is_copy), default=0)


# --- details -----------------------------------------------------------------------------------------------------------


def _name_type(config: dict[str, Any], dtype: str) -> None:
    name = str(torch_dtype(dtype)).removeprefix("torch.")
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "torch_dtype" not in config:
        config["dtype"] = name


def _refuse_non_finite(change: Change, piece: torch.Tensor, written: torch.Tensor) -> None:
    import torch

    if bool(torch.isfinite(written).all()):
        return
    if not bool(torch.isfinite(piece).all()):
        raise ModelError(f"{change.stored.name} would hold numbers that are not finite: the adapter or its base does.",
                         "Do not use this adapter; take an earlier checkpoint of its run.")
    raise ModelError(f"{change.stored.name} holds {float(piece.abs().max()):.3g}, which {change.outline.dtype} cannot.",
                     "Write bf16, which has the range of fp32: --dtype bf16")
