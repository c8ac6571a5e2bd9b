"""`builtin:tiny`: a small Llama with its own tokenizer, pretrained on the spot, so that everything works without network.

2.8 million parameters, byte-level BPE, a ChatML template. It is built once into the user's cache, from text that
`tiny_text` generates, and from then on is a folder like any other model's: nothing in the program treats it differently.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import OutputError
from qlora.home import cache_home
from qlora.model import tiny_text
from qlora.model.tiny_text import BEGIN, END, PAD, TURN

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinySettings:
    """Everything that decides the weights; a change of any value gives another folder.

    fp32 throughout: CPUs without 16-bit arithmetic are slow at anything else. Each row is one document, since a model this
    young takes other documents in its row for part of the question and is far slower to learn to look back. Matrices start
    wide (0.06, about 1 / sqrt(hidden size)): from the usual 0.02 a model this narrow only guesses for long.
    """

    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 3
    num_heads: int = 4
    vocab_size: int = 1024
    max_positions: int = 1024
    initial_std: float = 0.06
    num_steps: int = 240
    rows_per_step: int = 28
    max_tokens: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 15
    weight_decay: float = 0.05
    read_weight: float = 0.2  # what the loss gives tokens that are only read, against 1 for answers
    seed: int = 0


def tiny_folder(progress: Callable[[float, str], None] | None = None, settings: TinySettings = TinySettings()) -> Path:
    """The folder of the embedded base; built at the first call, which takes about a minute and a half on two cores.

    Two programs that start at once build it once: the second waits. A build that is killed leaves nothing that looks
    finished.

    Args:
        progress: called with the share done (0 to 1) and a word for what is being done.

    Raises:
        OutputError: the cache cannot be written.
    """
    folder = cache_home() / f"builtin-tiny-{_digest(settings)}"
    if _is_complete(folder):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                aside = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(aside, ignore_errors=True)
                _build(aside, settings, progress or (lambda share, text: None))
                shutil.rmtree(folder, ignore_errors=True)  # one that has lost files
                os.replace(aside, folder)
    except OSError as error:
        raise OutputError(
            f"The embedded base cannot be written to {folder.parent}: {error.strerror or error}.",
            "Free some space there (12 MiB), or set QLORA_CACHE to a folder you may write to.",
        ) from error
    return folder


# --- building ----------------------------------------------------------------------------------------------------------


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _digest(settings: TinySettings) -> str:
    """A name for the weights that come out: settings, text and template."""
    source = Path(tiny_text.__file__).read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(json.dumps(asdict(settings)).encode() + source).hexdigest()[:12]


def _build(folder: Path, settings: TinySettings, progress: Callable[[float, str], None]) -> None:
    import torch

    progress(0.0, "tokenizer")
    tokenizer = _train_tokenizer(settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = _new_model(settings, tokenizer)
    _pretrain(model, tokenizer, settings, progress)
    folder.mkdir(parents=True)
    # 16 bits, as real models come.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(settings: TinySettings) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    digits_alone = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits_alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(settings.seed)
    marks = (BEGIN, TURN, END, PAD)
    texts = []
    for _ in range(3000):
        text = tiny_text.document(rng, ['{"', '":', '"}', "[", "]", "1", "<", ">"])
        for mark in marks:
            text = text.replace(mark, "")
        texts.append(text)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=settings.vocab_size, special_tokens=[PAD, BEGIN, END, TURN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD, additional_special_tokens=[TURN],
        model_max_length=settings.max_positions,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _new_model(settings: TinySettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size, intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers, num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads, max_position_embeddings=settings.max_positions, tie_word_embeddings=True,
        initializer_range=settings.initial_std, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))


def _pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: TinySettings, progress: Callable[[float, str], None]
) -> None:
    """AdamW with a warm-up, a plateau and a linear fall over the second half."""
    import torch

    rng = random.Random(settings.seed + 1)
    pieces = [tokenizer.convert_tokens_to_string([token]) for token in sorted(tokenizer.get_vocab())]
    pieces = [piece for piece in pieces if piece.strip() and "\ufffd" not in piece and not piece.startswith("<|")]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    assistant = tokenizer.convert_tokens_to_ids("assistant")
    model.train()
    for step in range(settings.num_steps):
        left = (settings.num_steps - step) / settings.num_steps
        rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps, max(0.04, 2 * left))
        optimizer.param_groups[0]["lr"] = rate
        rows = [tokenizer.encode(tiny_text.document(rng, pieces), add_special_tokens=False)[: settings.max_tokens]
                for _ in range(settings.rows_per_step)]
        ids, weights = _pad(rows, tokenizer, assistant, settings.read_weight)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress((step + 1) / settings.num_steps, "pretraining")
    model.eval()


def _pad(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerFast, assistant: int, read_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss weights, both of shape (rows, tokens): 1 for answers, less for the rest, 0 for padding."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        answering = tokenizer.bos_token_id == row[0]  # a story is all text to be learned
        for position, token in enumerate(row):
            weights[number, position] = 1.0 if answering else read_weight
            answering = (answering or token == assistant) and token != tokenizer.eos_token_id
        ids[number, : len(row)] = torch.tensor(row)
    return ids, weights
