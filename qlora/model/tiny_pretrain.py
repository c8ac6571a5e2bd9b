"""How the embedded base is made: its tokenizer, the weights it starts from, and a minute of training on the CPU.

A minute on two cores is a million tokens, too few for an ordinary start. Three things make them enough:

- Words are tokens without their leading space, so a word repeated at the start of an answer is the very same token.
- Four attention heads start as what training would find first: two look one and two tokens back, and two look for what
  followed the same words before and say it again (induction heads: Olsson et al. 2022, "In-context learning and
  induction heads"). Rows of random tokens, said twice, keep them alive and give every token of the vocabulary an
  embedding of its own, those too that the text never uses.
- Matrices are trained with orthogonalised momentum (Muon: Jordan et al. 2024), embeddings and norms with AdamW.

Measured 2026-11 on 2 cores of an AMD EPYC with AVX512-BF16, torch 2.13, by `python -m qlora.model.tiny_pretrain`.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.model.tiny_text import BEGIN, END, PAD, TURN, documents

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[float, str], None]

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_SIZE, MAX_POSITIONS = 2048, 192, 512, 4, 3, 64, 1024
SEED = 1
NUM_STEPS, ROWS_PER_STEP, ROW_TOKENS = 360, 16, 128
ECHO_STEPS, ECHO_SHARE = 0.1, 0.25  # the first tenth of the steps is echoes alone; later one document in four
WARMUP_STEPS, DECAY_SHARE = 40, 0.4
MATRIX_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.95, 0.05
EMBEDDING_RATE = 0.006

# JSON, code and other writing that the text leaves out still gets tokens of its own, for adapters to use.
_PUNCTUATION = ['{"name": "a", "count": 3, "list": []}', '[{"a": 1}, {"b": "c"}]', '{"": {"": [""]}}', "(a) [b] {c} <d> </d> `e`",
                "# a\n- b\n* c\n| d |", "a = b + c; d == e; f != g", "http://a/b?c=d&e", "\n\n    \n\n", "don't it's we'll you're"]

_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] %}
{%- set call = call['function'] or call %}
{{- ('\\n' if message['content'] or not loop.first else '') + 'call ' + call['name'] + ' ' }}
{{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def build(folder: Path, report: Progress, num_steps: int | None = None) -> None:
    """Write the finished model and tokenizer into an empty folder. The same bytes each time on the same machine."""
    import torch

    report(0.0, "making the embedded base: tokenizer and text")
    tokenizer = make_tokenizer()
    steps = num_steps or NUM_STEPS
    rows = _rows(tokenizer.backend_tokenizer, steps * ROWS_PER_STEP)
    model = make_model(tokenizer)
    with torch.enable_grad():
        pretrain(model, rows, steps, report)
    # bf16: the base is computed in bf16 or quantised to 4 bit from it anyway, and the file is half as long.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report(1.0, "the embedded base is ready")


# --- tokenizer -----------------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any UTF-8 text comes back as it was. Digits and spaces are tokens of their own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d|[^\S\n]|\n+|\p{L}+|[^\s\d\p{L}]+ ?"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    text = [document.replace(TURN, "").replace(END, "").replace(BEGIN, "") for document in itertools.islice(documents(SEED), 3000)]
    tokenizer.train_from_iterator(text + _PUNCTUATION * 50, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[PAD, BEGIN, END, TURN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, additional_special_tokens=[TURN],
        model_max_length=MAX_POSITIONS, clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _TEMPLATE
    return fast


# --- rows ----------------------------------------------------------------------------------------------------------------


def _rows(tokenizer: Tokenizer, num_rows: int) -> list[tuple[list[int], list[bool]]]:
    """Rows of up to ROW_TOKENS + 1 tokens, and for each token whether the loss counts it."""
    rng = random.Random(SEED)
    echoes = int(num_rows * ECHO_STEPS)
    mixed = (document for text in _texts(tokenizer)
             for document in ((_echo(tokenizer, rng), text) if rng.random() < ECHO_SHARE else (text,)))
    only_echoes = iter(lambda: _echo(tokenizer, rng), None)
    return [*itertools.islice(_packed(only_echoes), echoes), *itertools.islice(_packed(mixed), num_rows - echoes)]


def _texts(tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Documents as tokens. The loss counts prose, and in conversations the assistant's turns."""
    begin, turn, end = (tokenizer.token_to_id(token) for token in (BEGIN, TURN, END))
    assistant = tokenizer.encode(f"{TURN}assistant\n").ids
    source = documents(SEED)
    while True:
        for encoding in tokenizer.encode_batch(list(itertools.islice(source, 1000))):
            ids, counted, on = encoding.ids, [], False
            for place, token in enumerate(ids):
                on = on and token != turn
                counted.append(on)
                if token == begin or ids[place + 1 - len(assistant) : place + 1] == assistant:
                    on = True
                elif token == end:
                    on = False
            if len(ids) <= ROW_TOKENS + 1:
                yield ids, counted


def _echo(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Random tokens, said twice; half of the time with spaces between them, as words have."""
    begin, end, space = (tokenizer.token_to_id(token) for token in (BEGIN, END, "\u0120"))
    said = [rng.randrange(end + 2, VOCAB) for _ in range(rng.randint(4, 24))]
    if rng.random() < 0.5:
        said[1::2] = [space] * (len(said) // 2)
    return [begin, *said, *said, end], [False] * (2 + len(said)) + [True] * len(said)


def _packed(documents: Iterator[tuple[list[int], list[bool]]]) -> Iterator[tuple[list[int], list[bool]]]:
    """Several documents to a row, each put where it leaves the least room; the fullest of a dozen rows goes out."""
    open_rows: list[tuple[list[int], list[bool]]] = []
    for ids, counted in documents:
        fitting = [row for row in open_rows if len(row[0]) + len(ids) <= ROW_TOKENS + 1]
        if fitting:
            row = max(fitting, key=lambda row: len(row[0]))
            row[0].extend(ids)
            row[1].extend(counted)
        else:
            open_rows.append((list(ids), list(counted)))
        if len(open_rows) > 12:
            fullest = max(range(len(open_rows)), key=lambda place: len(open_rows[place][0]))
            yield open_rows.pop(fullest)


# --- weights -------------------------------------------------------------------------------------------------------------


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model before training, fp32 on the CPU, with the four heads of the module's docstring in place."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_SIZE, max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        _start_weights(model, config.rope_parameters["rope_theta"])
    return model


def _start_weights(model: LlamaForCausalLM, theta: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(SEED)

    def normal(weight: torch.Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    embeddings = model.model.embed_tokens.weight
    normal(embeddings, 0.06)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj):
            normal(linear.weight, HIDDEN**-0.5)
        normal(mlp.down_proj.weight, 0.004)
        # Like looks at like, and what is seen is passed on: heads of trained models lean this way (Trockman and Kolter
        # 2023, "Mimetic initialization of self-attention layers"). Small, so that a layer adds to its input gently.
        attention.k_proj.weight.mul_(0.75**0.5).add_(attention.q_proj.weight, alpha=0.5)
        attention.o_proj.weight.mul_(0.75**0.5).add_(attention.v_proj.weight.T, alpha=0.5).mul_(0.1)

    # Heads 0 and 1 of layer 0 look one and two tokens back. Their queries and keys read a part that all embeddings share,
    # and the query is turned back by so many positions that rotary embedding makes the product largest just there.
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    embeddings[:, 0] = 0.5 * 0.06 * HIDDEN**0.5
    pairs = torch.arange(HEAD_SIZE // 2)
    angles = theta ** (-2 * pairs / HEAD_SIZE)
    strength = torch.exp(-0.15 * pairs)
    strength = 2 * strength / strength.norm()
    basis = torch.linalg.qr(torch.randn(HIDDEN, 3 * HEAD_SIZE, generator=generator))[0]
    read, *written = basis.split(HEAD_SIZE, dim=1)
    read = read.T.clone()
    read[:, 0] = 0
    heads = [slice(0, HEAD_SIZE), slice(HEAD_SIZE, 2 * HEAD_SIZE)]
    for back, (head, write) in enumerate(zip(heads, written), start=1):
        first.q_proj.weight[head] *= 0.3
        first.k_proj.weight[head] *= 0.3
        first.q_proj.weight[head, 0] = torch.cat([strength * (back * angles).cos(), -strength * (back * angles).sin()])
        first.k_proj.weight[head, 0] = torch.cat([strength, torch.zeros_like(strength)])
        first.v_proj.weight[head] = read
        first.o_proj.weight[:, head] = 0.1 * write

    # Head 0 of layer 1 looks for places whose previous token is the current one; head 1 for places whose token before the
    # previous is the one before the current, which finds the next word across a space. Both say the token they find. They
    # use the slowly turning pairs only, because the distance does not matter.
    slow = (torch.cat([pairs, pairs]) >= 12).float()[:, None]
    for head, query, key in zip(heads, (read, written[0].T), (written[0].T, written[1].T)):
        second.q_proj.weight[head] = 4 * slow * query
        second.k_proj.weight[head] = 4 * slow * key
        second.o_proj.weight[:, head] = second.v_proj.weight[head].T


# --- training ------------------------------------------------------------------------------------------------------------


def pretrain(
    model: LlamaForCausalLM, rows: list[tuple[list[int], list[bool]]], num_steps: int, report: Progress
) -> list[float]:
    """Train on `rows`, ROWS_PER_STEP at a time; returns the loss of each step."""
    import torch
    import torch.nn.functional as F

    embeddings = model.model.embed_tokens.weight
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not embeddings]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    adamw = torch.optim.AdamW([embeddings, *norms], lr=EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    momenta = [torch.zeros_like(weight) for weight in matrices]
    dtype = _faster_dtype()
    pad, decay_steps = model.config.pad_token_id, max(1, int(num_steps * DECAY_SHARE))
    model.set_attn_implementation("eager")  # on short rows 1.4 times as fast as the fused kernel, whose backward is slow on CPUs
    model.train()
    losses = []
    for step in range(num_steps):
        part = rows[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        length = max(len(ids) for ids, _ in part)
        tokens = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in part])
        counted = torch.tensor([flags + [False] * (length - len(flags)) for _, flags in part])[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            logits = F.linear(hidden[counted], embeddings)  # (counted tokens, VOCAB); the others need none
        loss = F.cross_entropy(logits.float(), tokens[:, 1:][counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, (step + 1) / WARMUP_STEPS, (num_steps - step) / decay_steps)
        _muon_step(matrices, momenta, MATRIX_RATE * share, dtype)
        for group in adamw.param_groups:
            group["lr"] = EMBEDDING_RATE * share
        adamw.step()
        model.zero_grad()
        losses.append(loss.item())
        report((step + 1) / num_steps, f"training the embedded base, loss {losses[-1]:.2f}")
    model.set_attn_implementation("sdpa")
    return losses


def _muon_step(weights: list[torch.Tensor], momenta: list[torch.Tensor], rate: float, dtype: torch.dtype) -> None:
    """One update whose singular values are all near 1, from the momentum of each gradient; same shapes together.

    Five Newton-Schulz steps with the coefficients of https://kellerjordan.github.io/posts/muon/.
    """
    import torch

    by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    with torch.no_grad():
        for weight, momentum in zip(weights, momenta):
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            update = weight.grad.lerp(momentum, MOMENTUM)
            update = update.T if update.shape[0] > update.shape[1] else update
            by_shape.setdefault(tuple(update.shape), []).append((weight, update))
        for group in by_shape.values():
            stacked = torch.stack([update for _, update in group])
            stacked = (stacked / (stacked.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
            for _ in range(5):
                square = stacked @ stacked.mT
                stacked = 3.4445 * stacked + (-4.7750 * square + 2.0315 * square @ square) @ stacked
            for (weight, _), update in zip(group, stacked.float()):
                update = update.T if weight.shape[0] > weight.shape[1] else update
                weight.mul_(1 - rate * WEIGHT_DECAY)
                weight.add_(update, alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def _faster_dtype() -> torch.dtype:
    """bf16 on processors that multiply it faster than fp32, else fp32; the ratio is about 2 or far below 1."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(2048, HIDDEN, dtype=dtype), torch.ones(HIDDEN, INTERMEDIATE, dtype=dtype)
        taken = []
        for _ in range(10):
            started = time.perf_counter()
            left @ right
            taken.append(time.perf_counter() - started)
        return min(taken)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
