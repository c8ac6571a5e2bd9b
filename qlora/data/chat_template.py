"""Choose the chat template, and the special tokens that training and generation need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.rows import Finding
from qlora.errors import DataError

_FOLDER = Path(__file__).parent / "templates"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Tokens that tokenizers carry for padding without saying so, for example Llama 3's.
_KNOWN_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|fim_pad|>")


@dataclass(frozen=True)
class TemplateChoice:
    """The chat template in use: its name, where it comes from, and why this one."""

    name: str
    source: str
    reason: str


def named_templates() -> list[str]:
    """Templates that come with the program."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def set_chat_template(tokenizer: Any, name_or_path: str | None) -> TemplateChoice:
    """Give the tokenizer the template that is asked for, or one that suits it where it has none of its own.

    The template is set on the tokenizer, so that it is saved with the adapter. Where the tokenizer begins every text
    with a BOS token, the named templates write it, so that other programs that use the saved template do so too.

    Raises:
        DataError: no such name or file, or a template that is not valid Jinja.
    """
    if name_or_path is None and tokenizer.chat_template:
        return TemplateChoice("tokenizer", "tokenizer", "the tokenizer brings its own")
    if name_or_path is None:
        has_chatml = all(single_token(tokenizer, token) is not None for token in CHATML_TOKENS)
        name = "chatml" if has_chatml else "plain"
        reason = (
            f"the tokenizer has no template, but the tokens {' and '.join(CHATML_TOKENS)}"
            if has_chatml
            else f"the tokenizer has no template and no {CHATML_TOKENS[0]} token, so turns are ordinary words and end "
            f"with {tokenizer.eos_token}"
        )
    else:
        name, reason = name_or_path, "data.chat_template says so"
    if name in named_templates():
        tokenizer.chat_template = _named(name, adds_bos(tokenizer))
        return TemplateChoice(name, "built in", reason)
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise DataError(
            f'data.chat_template is "{name}", which is no named template, and as a file {problem}.',
            f"Named templates: {', '.join(named_templates())}. Or give the path of a .jinja file.",
        ) from None
    _check_syntax(text, path)
    tokenizer.chat_template = text
    return TemplateChoice(path.name, str(path), reason)


def _named(name: str, with_bos: bool) -> str:
    text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ("{{- bos_token }}" if with_bos else "") + text.removesuffix("\n")


def _check_syntax(text: str, path: Path) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(
            conversations=[], chat_template=text
        )  # compiles it, with the tags that chat templates may use
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"{path}:{error.lineno}: not a valid chat template: {error.message}.", "Correct the Jinja syntax."
        ) from None


# --- special tokens ---------------------------------------------------------------------------------------------------


def single_token(tokenizer: Any, text: str) -> int | None:
    """The id of `text` where the tokenizer knows it as one token, else None."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins every text with its BOS token by itself."""
    if tokenizer.bos_token_id is None:
        return False
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def set_special_tokens(tokenizer: Any) -> list[Finding]:
    """Check the tokenizer for what training needs, and give it a pad token where it has none.

    Labels never depend on the pad token: what is trained is decided by position, before anything is padded.

    Raises:
        DataError: no end-of-text token, or a tokenizer that cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for, so the answers' tokens "
            "cannot be told from the rest.",
            "Use a model with a tokenizer.json (a fast tokenizer).",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no end-of-text (eos) token, so the model could never learn to stop.",
            "Set eos_token in the model's tokenizer_config.json to the token that ends its texts.",
        )
    if tokenizer.pad_token_id is not None:
        return []
    known = [token for token in _KNOWN_PAD_TOKENS if single_token(tokenizer, token) is not None]
    tokenizer.pad_token = (known + [tokenizer.unk_token or tokenizer.eos_token])[0]
    what = "a pad token by its name" if known else "its unk token" if tokenizer.unk_token else "its eos token"
    return [
        Finding(
            "note",
            "pad_token",
            f"The tokenizer names no pad token; {tokenizer.pad_token} is used, {what}. Padding is never trained.",
        )
    ]
