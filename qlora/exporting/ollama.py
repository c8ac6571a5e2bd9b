"""A Modelfile for Ollama, with the chat template in Ollama's own language where it can be said in it.

Ollama looks whether a file's template is one that it knows, and falls back to none at all (its docs/template.md and
docs/modelfile.md). So the pieces around each message are found by rendering the template, put together in Go's language, and kept
only if they give the same text for several conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")
_CHAT = [["user", "one"], ["assistant", "two"], ["user", "three"]]
_PROBES = (_CHAT[:1], _CHAT, [["system", "be brief"], *_CHAT[:1]], [["system", "be brief"], *_CHAT])


@dataclass(frozen=True)
class Pieces:
    """What stands around the messages: `start` once, then before and after the text of each role, and `ask` where an answer
    begins."""

    start: str
    around: Mapping[str, tuple[str, str]]
    ask: str

    def render(self, messages: Sequence[Sequence[str]]) -> str:
        return self.start + "".join(self.around[role][0] + text + self.around[role][1] for role, text in messages) + self.ask


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, adds_bos: bool) -> tuple[str, bool]:
    """The text of a Modelfile, and whether it has the template. Without one, Ollama guesses by the template inside the file."""
    pieces = find_pieces(tokenizer)
    lines = [f"FROM ./{file}"]
    if pieces is not None:
        bos = tokenizer.bos_token
        start = pieces.start.removeprefix(bos) if adds_bos and bos else pieces.start
        lines.append(f'TEMPLATE """{_go(start, pieces)}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n", pieces is not None


def find_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """The template as pieces around messages; None where it is more than that, or there is none."""
    if not tokenizer.chat_template:
        return None
    try:
        found = _cut(tokenizer)
        refused = 0
        for probe in _PROBES:
            try:
                wanted = _render(tokenizer, probe, ask=True)
            except Exception:  # templates refuse in any way they like, a system message above all
                refused += 1
                continue
            if found.render(probe) != wanted:
                return None
        return found if refused < len(_PROBES) and not any('"""' in part or "{{" in part for part in _parts(found)) else None
    except Exception:  # it cannot be rendered like this: then it cannot be said either
        return None


# --- details -----------------------------------------------------------------------------------------------------------


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Sequence[str]], *, ask: bool) -> str:
    return tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in messages], tokenize=False,
                                         add_generation_prompt=ask)


def _cut(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """From one conversation of three messages, and one with a system message. Raises ValueError where it cannot be cut up."""
    first, answer, second, told = "\u00abone\u00bb", "\u00abtwo\u00bb", "\u00abthree\u00bb", "\u00abtold\u00bb"
    text = _render(tokenizer, [["user", first], ["assistant", answer], ["user", second]], ask=False)
    head, rest = _split(text, first)
    to_answer, rest = _split(rest, answer)
    to_second, after_user = _split(rest, second)
    if not to_answer.startswith(after_user):
        raise ValueError("a question ends otherwise when it is the last")
    before_user = to_second.removeprefix(after_user) if to_second.startswith(after_user) else to_second
    while not head.endswith(before_user) or _inside_token(tokenizer, head, len(head) - len(before_user)):
        before_user = before_user[1:]
    start, after_answer = head[: len(head) - len(before_user)], to_second[: len(to_second) - len(before_user)]
    around = {"user": (before_user, after_user), "assistant": (to_answer[len(after_user) :], after_answer), "system": ("", "")}
    try:
        text = _render(tokenizer, [["system", told], ["user", first]], ask=False)
        before, after = _split(text[len(start) :], told)
        around["system"] = (before, after[: after.index(before_user + first)])
    except Exception:  # a template may refuse a system message in any way it likes
        pass
    asked = _render(tokenizer, [["user", first]], ask=True)
    return Pieces(start, around, asked[len(start + before_user + first + after_user) :])


def _split(text: str, by: str) -> tuple[str, str]:
    where = text.index(by)
    return text[:where], text[where + len(by) :]


def _inside_token(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> bool:
    """Whether a special token of the text lies on both sides of a place."""
    tokens = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    return any(start < place < start + len(token) for token in tokens for start in range(max(0, place - len(token)), place)
               if text.startswith(token, start))


def _parts(pieces: Pieces) -> list[str]:
    return [pieces.start, pieces.ask, *(part for pair in pieces.around.values() for part in pair)]


def _go(start: str, pieces: Pieces) -> str:
    """In Go's text/template, without its `{{-`, which would take line breaks away."""
    text = start + "{{ range .Messages }}"
    for number, role in enumerate(_ROLES):
        before, after = pieces.around[role]
        text += "{{ " + ("if" if number == 0 else "else if") + f' eq .Role "{role}" }}}}' + before + "{{ .Content }}" + after
    return text + "{{ end }}{{ end }}" + pieces.ask


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
