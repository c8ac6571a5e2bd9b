"""The work that all contenders do: one checkpoint with random weights, one file of tokens, one set of numbers.

Nothing is downloaded. Weights are drawn once and written as a checkpoint in 16 bits, because that is what every peer begins with;
rows are words of a small vocabulary in a fixed random order, each row cut to the same number of tokens.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_NUM_WORDS = 211
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Work:
    """What is trained, and how: the same for all.

    Attributes:
        model: what a person calls it; `folder` is where its checkpoint, tokenizer and rows are.
        length: tokens of a row; `micro_batch` rows make a step.
        rank: of the adapters, whose alpha is the same.
        learning_rate: constant, so that what is trained does not depend on how many steps there are.
    """

    model: str
    folder: str
    length: int = 256
    micro_batch: int = 2
    rank: int = 16
    learning_rate: float = 5e-4
    seed: int = 42
    threads: int = 2

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.length * self.micro_batch

    @property
    def checkpoint(self) -> Path:
        return Path(self.folder) / "checkpoint"

    @property
    def text_file(self) -> Path:
        return Path(self.folder) / "rows.jsonl"

    def rows(self) -> list[list[int]]:
        """The tokens of each row."""
        return json.loads((Path(self.folder) / "tokens.json").read_text(encoding="utf-8"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_work(work: Work, num_rows: int = 64) -> None:
    """Everything that the contenders read, into the work's folder.

    Raises:
        ModelError: there is no config for the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from qlora import _compat
    from qlora.architecture import find_config

    _compat.hide_loading_bars()
    config = find_config(work.model)
    torch.manual_seed(work.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(work.checkpoint)
    tokenizer = _word_tokenizer()
    tokenizer.save_pretrained(work.checkpoint)
    draw = random.Random(work.seed)
    texts = [" ".join(f"w{draw.randrange(_NUM_WORDS)}" for _ in range(work.length)) for _ in range(num_rows)]
    work.text_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokens = [tokenizer(text).input_ids[: work.length] for text in texts]
    assert all(len(row) == work.length for row in tokens), "rows of other lengths than wanted"
    (Path(work.folder) / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")


def _word_tokenizer() -> Any:
    """A word is a token, so that rows have the length that is wanted of them, whatever the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": 2 + i for i in range(_NUM_WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
