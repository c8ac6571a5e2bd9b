"""What the other test_data_* files share: small real tokenizers, and templates in the styles of well-known families."""

import json

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The assistant's words marked by the template itself, the end-of-turn outside of the mark.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_IN_PARTS = MARKED.replace(
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>",
    "{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Thinking of earlier turns is dropped; the last turn gets an empty one where it has none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set think = '' %}{% set words = m.content %}{% if '</think>' in m.content %}"
    "{% set think = m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or think) %}<think>\n{{ think }}\n</think>\n\n{% endif %}{{ words }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinking is always dropped, and the generation prompt opens it: the prompt is no prefix of the conversation.
REASONER = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
# The end-of-text token comes once, after the whole conversation.
END_ONCE = (
    "{% for m in messages %}{{ '\n' if not loop.first }}{{ m.role }}:\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Phi-3-like: turns end with a token of their own, and eos comes once at the very end.
EOS_ONCE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# gpt-oss-like: the last answer ends with another token than the ones before, and a system message is always there.
RETURNING = (
    "<|start|>system<|message|>Hi.<|end|>{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
# GLM-like: nothing ends a turn; the next message's role token just follows.
ENDLESS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# A token stands between turns, and none after the last.
SEPARATED = (
    "{% for m in messages %}{{ '<|end|>' if not loop.first }}{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant:{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|start|>",
    "<|message|>",
    "<|return|>",
]
_CORPUS = [
    "user assistant system tool hello world how are you doing today answer question the of and to in is it that",
    "User: what is the answer?\nAssistant: the answer is  forty two.\n\n한국어 문장 예시 입니다. naïve café 12 + 30 = 42",
] * 20


def byte_tokenizer(template=None, *, bos=None, adds_bos=False, eos="<|im_end|>", pad="<|endoftext|>", special=SPECIAL):
    """A byte-level BPE tokenizer of a few hundred tokens, with trimmed offsets like GPT-2's and Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        )
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast


def stories_tokenizer(shared):
    """The real byte-fallback BPE tokenizer: 512 tokens, adds <s>, no pad token, no template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "stories260K")


def trained_text(row, tokenizer):
    """The text of the trained tokens, one string per run of them."""
    texts, run = [], []
    for label in [*row.labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat_file(path, *conversations, **extra):
    """A JSONL file of conversations, each a list of (role, content)."""
    return write_lines(
        path,
        [
            {"messages": [{"role": role, "content": content} for role, content in turns], **extra}
            for turns in conversations
        ],
    )


@pytest.mark.parametrize("text", ["hello  world ", "한국어 naïve\n\ncafé", "<|im_start|>user\nhi<|im_end|>"])
def test_the_test_tokenizer_loses_nothing(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("<|im_start|>").input_ids) == 1
