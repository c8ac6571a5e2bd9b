"""Answers by greedy decoding, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of prompts and answers in one batch: 4,096 take 0.5 GiB of cache on an 8B model.
TOKENS_PER_BATCH = 4096
_MAX_ROWS_PER_BATCH = 32
# Of an answer, however long its reference is.
MAX_ANSWER_TOKENS = 256
_SPARE_TOKENS = 8
# The most probable token, whatever the base's generation_config recommends: what is left open is filled in from there. The last
# three have no effect then; their values are those at which transformers (5.17 to 5.23) does not say so.
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def rows_at_once(prompt_tokens: int, max_new_tokens: int, tokens_per_batch: int = TOKENS_PER_BATCH) -> int:
    """Rows of a batch whose longest prompt has `prompt_tokens`; one at least."""
    return max(1, min(tokens_per_batch // (prompt_tokens + max_new_tokens), _MAX_ROWS_PER_BATCH))


def longest_answer(references: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that an answer may have at most: as many as the longest reference, and a little more; 0 without any."""
    lengths = [len(tokenizer(reference, add_special_tokens=False).input_ids) for reference in references]
    return min(max(lengths) + _SPARE_TOKENS, MAX_ANSWER_TOKENS) if lengths else 0


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The text that the model writes after each prompt (token ids), without special tokens, in the order of `prompts`.

    Greedy, so that the same weights give the same answers. Stops at any of `stop_ids` or after `max_new_tokens`. Rows
    that share a batch have at most `tokens_per_batch` tokens together, answers included; the planner says how many fit.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=1, use_cache=True, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id,
        **GREEDY,
    )
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    done = 0
    with torch.no_grad():
        for batch in _batches(prompts, max_new_tokens, tokens_per_batch):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), tokenizer.pad_token_id)
            mask = torch.zeros((len(batch), width), dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]):] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]):] = 1
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
            for row, i in enumerate(batch):
                answers[i] = tokenizer.decode(out[row, width:], skip_special_tokens=True).strip()
            done += len(batch)
            if progress:
                progress(done, len(prompts))
    model.train(was_training)
    return answers


def _batches(prompts: Sequence[list[int]], max_new_tokens: int, tokens_per_batch: int) -> list[list[int]]:
    """Indices grouped so that prompts of like length share a batch and none exceeds the token limit."""
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True):
        if batches and len(batches[-1]) < rows_at_once(len(prompts[batches[-1][0]]), max_new_tokens, tokens_per_batch):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
