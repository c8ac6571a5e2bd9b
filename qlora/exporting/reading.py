"""Read a GGUF file back: its header by gguf-py, its tensors from the disk as they are asked for, its tokenizer as llama.cpp uses
it.

Nothing of what was meant to be written is used but the places of tensors, so that this says what is in the file.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.exporting.vocabulary import CONTROL, DIGITS, GPT2, SPLITS, USER_DEFINED, WHOLE_WORDS

if TYPE_CHECKING:
    import torch

_READ_BYTES = 2**26


class GgufFile:
    """A GGUF file on the disk.

    Attributes:
        values: of the header, by key.
    """

    def __init__(self, path: Path):
        """Raises ValueError or OSError where it is none."""
        import gguf

        reader = gguf.GGUFReader(path)
        self.path = path
        self.values: dict[str, Any] = {key: _value(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        # gguf-py maps the file; mapped pages that were read would count as memory of this process, so tensors are read anew.
        self._tensors = {
            tensor.name: (tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape)), int(tensor.data_offset),
                          int(tensor.n_bytes))
            for tensor in reader.tensors
        }

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def type_of(self, name: str) -> str:
        """GGML's name of a tensor's type."""
        return self._tensors[name][0].name

    def rows(self, name: str) -> Rows:
        """A tensor whose rows are read when they are asked for."""
        kind, shape, start, size_bytes = self._tensors[name]
        return Rows(self.path, name, kind, shape, start, size_bytes)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in fp32, in torch's order of sizes."""
        found = self.rows(name)
        return found.between(0, len(found)).reshape(found.shape)


class Rows:
    """Rows of a tensor on the disk; enough of a tensor for `qlora.merging.streamed`."""

    def __init__(self, path: Path, name: str, kind: Any, shape: tuple[int, ...], start: int, size_bytes: int):
        self.shape, self._path, self._name, self._kind, self._start = shape, path, name, kind, start
        self._row_bytes = size_bytes // len(self) if len(self) else 0

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def __getitem__(self, which: slice | torch.Tensor) -> torch.Tensor:
        import torch

        if isinstance(which, slice):
            first, last, _ = which.indices(len(self))
            return self.between(first, last)
        return torch.cat([self.between(row, row + 1) for row in which.tolist()])

    def float(self) -> torch.Tensor:
        return self.between(0, len(self))

    def between(self, first: int, last: int) -> torch.Tensor:
        """Rows in fp32, of shape (last - first, ...).

        Raises:
            OSError: the file is shorter than its header says.
        """
        import gguf
        import numpy as np
        import torch

        found = torch.empty((last - first, *self.shape[1:]), dtype=torch.float32)
        step = max(1, _READ_BYTES // max(1, self._row_bytes))
        with self._path.open("rb") as file:
            file.seek(self._start + first * self._row_bytes)
            for row in range(0, last - first, step):
                wanted = min(step, last - first - row) * self._row_bytes
                piece = file.read(wanted)
                if len(piece) != wanted:
                    raise OSError(f"{self._path} ends in the middle of {self._name}.")
                values = gguf.quants.dequantize(np.frombuffer(piece, dtype=np.uint8).reshape(-1, self._row_bytes), self._kind)
                target = found[row : row + step]
                target.copy_(torch.from_numpy(np.array(values, dtype=np.float32)).reshape(target.shape))
        return found


class Encoder:
    """Text to token ids as llama.cpp does it, from nothing but the header (src/llama-vocab.cpp: llm_tokenizer_bpe, _spm)."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
        self._ids = {text: number for number, text in reversed(list(enumerate(tokens)))}
        whole = [text for text, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
        whole.sort(key=len, reverse=True)  # the longest of those that begin at a place is meant
        self._whole = re.compile("|".join(map(re.escape, whole))) if whole else None
        self._is_bytes = values["tokenizer.ggml.model"] == "gpt2"
        self._bpe = _byte_level(values, self._ids) if self._is_bytes else None
        self._scores = values.get("tokenizer.ggml.scores")

    def encode(self, text: str) -> list[int]:
        """Token ids, with tokens that are written out in the text found as such, and without any that are added."""
        ids: list[int] = []
        for piece, is_token in self._fragments(text):
            if is_token:
                ids.append(self._ids[piece])
            elif self._bpe is not None:
                ids += self._bpe.encode(piece, add_special_tokens=False).ids
            else:
                prefix = " " if self._values.get("tokenizer.ggml.add_space_prefix", True) and self._after_special else ""
                ids += self._join((prefix + piece).replace(" ", "\u2581"))
            self._after_special = is_token
        return ids

    def _fragments(self, text: str) -> list[tuple[str, bool]]:
        self._after_special = True
        found, last = [], 0
        for match in self._whole.finditer(text) if self._whole else ():
            found += [(text[last : match.start()], False), (match[0], True)]
            last = match.end()
        return [each for each in (*found, (text[last:], False)) if each[0]]

    def _join(self, text: str) -> list[int]:
        """Pairs of neighbours whose text is a token are joined, the highest score first, then the leftmost."""
        parts: list[str | None] = list(text)
        before, after = list(range(-1, len(parts) - 1)), [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                both = parts[left] + parts[right]
                if both in self._ids:
                    heapq.heappush(queue, (-self._scores[self._ids[both]], left, right, both))

        for right in range(1, len(parts)):
            offer(right - 1, right)
        while queue:
            _, left, right, both = heapq.heappop(queue)
            if parts[left] is None or parts[right] is None or parts[left] + parts[right] != both or after[left] != right:
                continue
            parts[left], parts[right], after[left] = both, None, after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        ids: list[int] = []
        for part in parts:
            if part is not None:
                ids += [self._ids[part]] if part in self._ids else [self._ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        return ids


# --- details -----------------------------------------------------------------------------------------------------------


def _value(field: Any) -> Any:
    """A value of the header in Python's own types."""
    import gguf

    kind = field.types[0]
    if kind == gguf.GGUFValueType.STRING:
        return str(bytes(field.parts[-1]), encoding="utf-8")
    if kind != gguf.GGUFValueType.ARRAY:
        return field.parts[-1].tolist()[0]
    if field.types[-1] == gguf.GGUFValueType.STRING:
        return [str(bytes(field.parts[index]), encoding="utf-8") for index in field.data]
    return [field.parts[index].tolist()[0] for index in field.data]


def _byte_level(values: Mapping[str, Any], ids: Mapping[str, int]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    pre = values["tokenizer.ggml.pre"]
    merges = [tuple(pair.split(" ")) for pair in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=dict(ids), merges=merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in SPLITS:
        steps = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if pre == DIGITS:
            steps.insert(0, pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"))
        elif pre != GPT2:  # llama.cpp's default
            steps = [pre_tokenizers.Split(Regex(r"[\p{P}\$\+<=>\^~\|]+"), "isolated"), *steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer
