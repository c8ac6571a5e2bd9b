"""Data sets: read, check, split, write through a chat template, tokenise, cut. README.md here is for people.

Nothing here knows of models, planning or training: plain arguments in, plain data out.
"""

from qlora.data.chat_template import TemplateChoice, adds_bos, named_templates, set_chat_template, set_special_tokens
from qlora.data.findings import end_ids, findings
from qlora.data.lengths import FitResult, LengthStats, fit_length, length_stats
from qlora.data.prepare import PreparedData, fingerprint, prepare
from qlora.data.read import read_rows
from qlora.data.rows import BadRow, Finding, Row, RowSet
from qlora.data.split import split_rows
from qlora.data.tokenise import GenerationSample, TokenRow, generation_samples, tokenise

__all__ = [
    "BadRow",
    "Finding",
    "FitResult",
    "GenerationSample",
    "LengthStats",
    "PreparedData",
    "Row",
    "RowSet",
    "TemplateChoice",
    "TokenRow",
    "adds_bos",
    "end_ids",
    "findings",
    "fingerprint",
    "fit_length",
    "generation_samples",
    "length_stats",
    "named_templates",
    "prepare",
    "read_rows",
    "set_chat_template",
    "set_special_tokens",
    "split_rows",
    "tokenise",
]
