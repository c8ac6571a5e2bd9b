"""A tokenizer as a GGUF file holds it: tokens with scores and kinds, merges, and the name of how text is cut before them.

llama.cpp has the regular expressions themselves inside (src/llama-vocab.cpp, as of llama-cpp-python 0.3.36) and a file names one
of them, so the name is found here by the expression that tokenizer.json has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora.errors import ModelError
from qlora.exporting.metadata import Field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.md, tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _MARKS
SPLITS = {  # llama.cpp's name: the expression; one is there twice, with and without a look for whole words among the tokens
    "dbrx": LLAMA3,
    "llama-bpe": LLAMA3,
    "qwen2": _WORDS + r"|\p{N}" + _MARKS,
    "qwen35": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,
    "tekken": (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES),
    "gpt-4o": (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
               rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
               r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES),
}
WHOLE_WORDS = ("llama-bpe", "tekken")  # a piece that is a token as it stands is taken so, whatever the merges say
# Cut by GPT-2's own expression, and digits one by one before that.
GPT2, DIGITS = "gpt-2", "smollm"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for the header.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece's.
        pre: llama.cpp's name for how text is cut; "default" where it has none for this one.
        tokens, kinds: of every row of the embedding. scores: how early a token is merged; empty for byte-level BPE.
        merges: pairs, the first before the others; empty for SentencePiece's.
        fields: all of it and the special tokens.
        stops: texts of the tokens that end an answer.
        notes: what somebody who uses the file should know.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    fields: tuple[Field, ...]
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: tuple[int, ...]) -> Vocabulary:
    """A tokenizer of Transformers, for a model with so many rows in its embedding.

    Args:
        ends: tokens beside the tokenizer's own that end an answer, as generation_config.json has them.

    Raises:
        ModelError: it is of a kind that is not written here, or has tokens beyond the embedding that cannot be left out.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} has no tokenizer.json, from which a GGUF file's tokens are taken.",
                         "Save the tokenizer as a fast one, beside the adapter: "
                         "AutoTokenizer.from_pretrained(base).save_pretrained(adapter)")
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model, notes = document["model"], []
    steps = _steps(document.get("pre_tokenizer"))
    if model["type"] != "BPE":
        raise ModelError(f"The tokenizer is a {model['type']} model; byte-level BPE and SentencePiece's BPE are written as GGUF.",
                         "Write the merged model with `qlora merge`, and convert that folder with llama.cpp's "
                         "convert_hf_to_gguf.py.")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not byte_level and not model.get("byte_fallback"):
        raise ModelError("The tokenizer is neither byte-level nor SentencePiece's with bytes to fall back on.",
                         "Use the merged model instead: qlora merge")
    tokens, kinds = _tokens(tokenizer, document, vocab_size, byte_level, notes)
    merges = tuple(tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
    pre, scores = "default", ()
    if byte_level:
        pre = _name_of_split(steps, bool(model.get("ignore_merges")))
        if pre == "default":
            notes.append("llama.cpp has no name for how this tokenizer cuts text; the file says `default`, and some texts may be "
                         "cut otherwise.")
    else:
        scores, merges = _scores(model["vocab"], merges, tokens), ()
    found = _special(tokenizer, ends, vocab_size)
    fields = _fields(tokenizer, "gpt2" if byte_level else "llama", pre, tokens, kinds, scores, merges, found)
    ends = tuple(number for number in (found.get("eos"), *ends) if number is not None and number < vocab_size)
    stops = tuple(dict.fromkeys(tokens[number] for number in ends))
    return Vocabulary("gpt2" if byte_level else "llama", pre, tuple(tokens), tuple(kinds), tuple(scores), merges, fields, stops,
                      tuple(notes))


# --- details -----------------------------------------------------------------------------------------------------------


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [inner for each in step["pretokenizers"] for inner in _steps(each)] if step["type"] == "Sequence" else [step]


def _name_of_split(steps: list[Mapping[str, Any]], whole_words: bool) -> str:
    """llama.cpp's name of the way in which text is cut into words."""
    if any(step["type"] not in ("Split", "Digits", "ByteLevel") or step.get("add_prefix_space") for step in steps):
        return "default"
    *before, last = steps
    if last["type"] != "ByteLevel":
        return "default"
    patterns = [_pattern(step) for step in before]
    if last.get("use_regex", True):
        return GPT2 if not before else DIGITS if patterns in ([r"\p{N}"], [r"\d"]) else "default"
    names = [name for name, split in SPLITS.items() if patterns == [split]]
    return next((name for name in names if (name in WHOLE_WORDS) == whole_words), names[0] if len(names) == 1 else "default")


def _pattern(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits") else None
    # The expressions match every character, so that removing what they do not match is the same as cutting at each match.
    if (step.get("behavior"), bool(step.get("invert"))) not in (("Isolated", False), ("Removed", True)):
        return None
    return (step.get("pattern") or {}).get("Regex")


def _tokens(
    tokenizer: PreTrainedTokenizerBase, document: Mapping[str, Any], vocab_size: int, byte_level: bool, notes: list[str]
) -> tuple[list[str], list[int]]:
    """Text and kind of each row of the embedding."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    beyond = []
    for text, number in document["model"]["vocab"].items():
        if number >= vocab_size:
            beyond.append(text)
            continue
        tokens[number] = text
        kinds[number] = BYTE if not byte_level and len(text) == 6 and text.startswith("<0x") else NORMAL
    for added in document.get("added_tokens") or ():
        if added["id"] >= vocab_size:
            beyond.append(added["content"])
            continue
        # Tokens that people may write have their spaces as such (llama.cpp, conversion/base.py: get_vocab_base).
        own = added["content"] if added["special"] or byte_level else added["content"].replace("\u2581", " ")
        tokens[added["id"]], kinds[added["id"]] = own, CONTROL if added["special"] else USER_DEFINED
    if not byte_level and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    if beyond:
        used = [text for text in (tokenizer.eos_token, tokenizer.bos_token) if text in beyond]
        if used:
            raise ModelError(f"The tokenizer's {used[0]} has no row in the model's embedding of {vocab_size:,}.",
                             "Base and tokenizer do not belong together; name the right base: --base MODEL")
        notes.append(f"{len(beyond)} tokens of the tokenizer have no row in the model's embedding and are left out, first "
                     f"{beyond[0]}.")
    return tokens, kinds


def _scores(vocab: Mapping[str, int], merges: tuple[tuple[str, ...], ...], tokens: list[str]) -> list[float]:
    """llama.cpp joins the pair whose token has the highest score; so the first merge has the highest of them."""
    scores = [-1000.0 - len(merges)] * len(tokens)
    for rank, pair in reversed(list(enumerate(merges))):
        number = vocab.get("".join(pair))
        if number is not None and number < len(scores):
            scores[number] = -float(rank)
    return scores


def _special(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], vocab_size: int) -> dict[str, int]:
    found = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id,
             "padding": tokenizer.pad_token_id}
    eos = found["eos"]
    found["eot"] = next((number for number in ends if number != eos), None)
    return {name: number for name, number in found.items() if number is not None and number < vocab_size}


def _fields(
    tokenizer: PreTrainedTokenizerBase, model: str, pre: str, tokens: list[str], kinds: list[int],
    scores: list[float] | tuple[()], merges: tuple[tuple[str, ...], ...], special: Mapping[str, int],
) -> tuple[Field, ...]:
    key = "tokenizer.ggml."
    fields = [Field(f"{key}model", model, "str"), Field(f"{key}pre", pre, "str"), Field(f"{key}tokens", tokens, "strs")]
    if scores:
        fields.append(Field(f"{key}scores", list(scores), "f32s"))
        fields.append(Field(f"{key}add_space_prefix", _prefixes_space(tokenizer), "bool"))
    fields.append(Field(f"{key}token_type", kinds, "i32s"))
    if merges:
        fields.append(Field(f"{key}merges", [" ".join(pair) for pair in merges], "strs"))
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unknown_token_id", "padding": "padding_token_id",
             "eot": "eot_token_id"}
    fields += [Field(key + names[name], number, "u32") for name, number in special.items()]
    ids = tokenizer("a")["input_ids"]
    fields.append(Field(f"{key}add_bos_token", "bos" in special and ids[:1] == [special["bos"]], "bool"))
    fields.append(Field(f"{key}add_eos_token", "eos" in special and ids[-1:] == [special["eos"]], "bool"))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        fields.append(Field("tokenizer.chat_template", template, "str"))
    return tuple(fields)


def _prefixes_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[:1] != ["a"]
