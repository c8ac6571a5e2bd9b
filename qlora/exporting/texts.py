"""Hold the tokenizer inside a GGUF file against the one that it was made from, on real texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.exporting.reading import Encoder, GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.", "It's 17:45, and they're late; we'll pay $1,234.50 (VAT incl.)!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 40))\t# 42", "   three spaces before,   three within, two after  ",
    "Grüße aus Köln, naïve façade, Ελληνικά, Привет", "日本語のテキストと中文，한국어", "emoji 🙂👍🏽 and symbols ≤ ∞ →",
    "CamelCaseWords snake_case_words 3.14e-10", "line one\r\nline two\n\nline four",
    "https://example.org/path?query=1&other=two#top",
    "{\"key\": [1, 2, 3], \"none\": null}", "a",
)
_PROMPTS = ("Write one sentence about the sea.", "What is 17 plus 25? Answer with the number alone.",
            "Name the capital of Italy.")


@dataclass(frozen=True)
class TextCheck:
    """Which texts get the same token ids.

    Attributes:
        num_texts, num_same: cut by llama.cpp's rules, from the file alone.
        prompts_same: of those, whether all plain prompts in the model's own form are the same.
        example: the first text that is cut otherwise.
        by_transformers: texts that Transformers' tokenizer of the file cuts the same way; None where it does not read it.
    """

    num_texts: int
    num_same: int
    prompts_same: bool
    example: str | None
    by_transformers: int | None

    def words(self) -> str:
        said = f"{self.num_same} of {self.num_texts} texts get the same tokens by llama.cpp's rules"
        if self.by_transformers is None:
            return f"{said}; Transformers does not read it"
        return f"{said}, {self.by_transformers} by Transformers' reader"


def check_tokenizer(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> TextCheck:
    """Compare token ids, without those that are added at the ends."""
    prompts = [in_form(tokenizer, prompt) for prompt in _PROMPTS]
    texts = [*prompts, *_TEXTS]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    encoder = Encoder(GgufFile(folder / name).values)
    same = [encoder.encode(text) == ids for text, ids in zip(texts, wanted, strict=True)]
    example = next((text for text, is_same in zip(texts, same, strict=True) if not is_same), None)
    return TextCheck(len(texts), sum(same), all(same[: len(prompts)]), example, _by_transformers(folder, name, texts, wanted))


def in_form(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A question as the chat template has it; as it is where there is none."""
    if tokenizer.chat_template:
        try:
            message = {"role": "user", "content": prompt}
            return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse a lone question in any way it likes
            pass
    return prompt


def _by_transformers(folder: Path, name: str, texts: Sequence[str], wanted: Sequence[list[int]]) -> int | None:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), gguf_file=name)
        return sum(found(text, add_special_tokens=False)["input_ids"] == ids for text, ids in zip(texts, wanted, strict=True))
    except Exception:  # it has its own readers for each kind of tokenizer, which fail in their own ways on kinds they do not know
        return None
