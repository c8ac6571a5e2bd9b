"""Every setting of a recipe, declared once.

The declaration feeds the checks, the error messages, `qlora train --help` and the table in recipes/README.md. A value
that a person leaves out is `auto` or a plain default; `qlora.planning.choose` turns every `auto` into a value with a
reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from qlora.units import parse_size


def _no_bool(value: Any) -> Any:
    """Python counts True as 1; a recipe that says `epochs: yes` has a mistake in it."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


_PositiveInt = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
_CountInt = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
_PositiveFloat = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
_Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1, allow_inf_nan=False)]
_Percentile = Annotated[str, Field(pattern=r"^p([1-9]\d?|100)$")]
_Auto = Literal["auto"]
_AutoBool = Literal["auto"] | bool


def _setting(default: Any, help: str, expects: str, *, path: bool = False) -> Any:
    """One setting: its default, what it does, and the values it takes (the words used in help and in errors).

    `path=True` marks a value that may be a file or folder, written relative to the recipe that names it.
    """
    return Field(default, description=help, json_schema_extra={"expects": expects, "path": path})


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The frozen base."""

    base: str = _setting(
        ..., "The model to adapt.", "a Hub id, a folder with config.json, or builtin:tiny", path=True
    )
    revision: str | None = _setting(None, "Branch, tag or commit of a Hub model.", "text")
    weights: Literal["pretrained", "random"] = _setting(
        "pretrained", "`random` builds the model from its config alone, for benchmarks and tests.", "pretrained or random"
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = _setting(
        "auto", "Type of computation and of the adapters. Lower = less memory.", "auto, bf16, fp16 or fp32"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = _setting(
        "auto", "Attention implementation. eager stores length x length scores.", "auto, sdpa, eager or flash_attention_2"
    )
    trust_remote_code: bool = _setting(
        False, "Run Python code that comes with the model. Only for models whose code you have read.", "true or false"
    )


class DataSection(Section):
    """The rows to learn from."""

    path: str = _setting(
        ..., "Rows to train on.", "a .jsonl, .json, .csv or .parquet file, a folder of them, or a Hub id", path=True
    )
    split: str = _setting("train", "Split of a Hub data set.", "text")
    format: Literal[
        "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "question_answer", "text"
    ] = _setting(
        "auto",
        "Shape of a row; auto looks at the columns.",
        "auto, messages, prompt_completion, alpaca, sharegpt, question_answer or text",
    )
    columns: dict[str, str] = _setting(
        {}, "Your column for a field of the format, for example {question: Q, answer: A}.", "a mapping of field: column"
    )
    validation: _Auto | _Fraction | str = _setting(
        "auto",
        "Held-out rows: a share of the data, or a file of their own. auto = 5 %, at least 8 and at most 256 rows.",
        "auto, a share from 0 up to (not including) 1, or a file",
        path=True,
    )
    max_rows: _PositiveInt | None = _setting(None, "Use only so many rows, drawn with the seed.", "a whole number from 1")
    max_length: _Auto | _PositiveInt | _Percentile = _setting(
        "auto",
        "Longest row in tokens; the rest is cut. Higher = more memory. auto = the longest row, so that nothing is cut.",
        "auto, a whole number of tokens from 1, or a percentile of the rows' lengths such as p99",
    )
    chat_template: str | None = _setting(
        None, "Instead of the tokenizer's own.", "chatml, plain, or a .jinja file", path=True
    )
    train_on: Literal["answers", "all"] = _setting(
        "answers", "Which tokens the loss counts: the assistant's answers, or every token.", "answers or all"
    )
    packing: bool = _setting(
        False, "Put several short rows into one sequence; rows never see each other. Faster on short rows.", "true or false"
    )
    on_bad_row: Literal["error", "skip"] = _setting(
        "error", "A row that cannot be read stops the run, or is skipped and counted.", "error or skip"
    )


class LoraSection(Section):
    """The trainable adapters."""

    r: _Auto | _PositiveInt = _setting(
        "auto", "Rank. Higher = more capacity, a little more memory. auto = by the rules for data, model and card.", "auto or a whole number from 1"
    )
    alpha: _Auto | _PositiveFloat | Literal["conservative", "standard", "aggressive"] = _setting(
        "auto",
        "Scale of the adapters is alpha / r. auto = conservative = r; standard = 2r; aggressive = 4r.",
        "auto, conservative, standard, aggressive or a number above 0",
    )
    targets: Literal["all", "attention", "qv"] | list[str] = _setting(
        "all",
        "Projections that get an adapter. `qlora inspect MODEL` lists the names.",
        "all, attention, qv or a list of projection names",
    )
    dropout: _Fraction = _setting(
        0.0, "Dropout on the adapters' input. Above 0 costs activation memory.", "a number from 0 up to (not including) 1"
    )


class TrainSection(Section):
    """The training loop."""

    epochs: _PositiveFloat = _setting(1.0, "Passes over the data.", "a number above 0")
    max_steps: _PositiveInt | None = _setting(None, "Stop after so many optimizer steps.", "a whole number from 1")
    batch: _Auto | _PositiveInt = _setting(
        "auto", "Rows per optimizer step = micro_batch x accumulation. auto = 16, fewer for little data.",
        "auto or a whole number from 1",
    )
    micro_batch: _Auto | _PositiveInt = _setting(
        "auto", "Rows on the device at once. Higher = faster, more memory.", "auto or a whole number from 1"
    )
    accumulation: _Auto | _PositiveInt = _setting(
        "auto", "Micro-batches per optimizer step.", "auto or a whole number from 1"
    )
    learning_rate: _Auto | _PositiveFloat = _setting(
        "auto", "Peak learning rate. auto aims at 2e-4 x r / alpha.", "auto or a number above 0"
    )
    schedule: Literal["cosine", "linear", "constant"] = _setting(
        "cosine", "How the learning rate falls after the warm-up.", "cosine, linear or constant"
    )
    warmup: _Fraction = _setting(
        0.03, "Share of the steps in which the learning rate rises.", "a number from 0 up to (not including) 1"
    )
    weight_decay: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = _setting(
        0.0, "AdamW's weight decay on the adapters.", "a number from 0"
    )
    max_grad_norm: _PositiveFloat = _setting(1.0, "Gradients are scaled down to this norm.", "a number above 0")
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = _setting(
        "auto", "8-bit state takes less room; paged state can leave a GPU.",
        "auto, adamw, adamw_8bit or paged_adamw_8bit",
    )
    seed: _CountInt = _setting(42, "Seed of the split, the order, the adapters and dropout.", "a whole number from 0")
    eval_every: _Auto | _CountInt = _setting(
        "auto", "Steps between evaluations; 0 = only before and after. auto = five times a run.",
        "auto or a whole number of steps from 0",
    )
    monitor_every: _Auto | _CountInt = _setting(
        "auto", "Steps between looks at gradients and adapters, which plots and advice rest on; 0 = none. auto = about fifty looks a "
        "run, in at most one step of ten.", "auto or a whole number of steps from 0",
    )
    save_every: _Auto | _CountInt = _setting(
        "auto", "Steps between checkpoints, beside those of the best evaluation and the last step; 0 = none. auto = at each evaluation.",
        "auto or a whole number of steps from 0"
    )
    save_minutes: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)] = _setting(
        15.0, "A checkpoint after so many minutes as well; 0 = none.", "a number of minutes from 0"
    )
    try_out: Literal["once", "always", "never"] = _setting(
        "once", "Take the longest rows through everything before the run, to see that they fit; once = not again for the same rows "
        "and shapes on this machine.", "once, always or never",
    )
    keep: Literal["best", "last"] = _setting(
        "best", "The adapter that is kept: lowest validation loss, or the last step's.", "best or last"
    )
    sample_rows: _CountInt = _setting(
        64, "Held-out rows answered before and after training, for exact match. 0 = none.", "a whole number from 0"
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = _setting(
        [], "Trackers to send metrics to, if installed.", "a list of tensorboard, trackio, wandb"
    )


class MemorySection(Section):
    """Where the run happens and how much room it has."""

    device: Literal["auto", "cuda", "cpu"] = _setting(
        "auto", "auto = the GPU if there is one.", "auto, cuda or cpu"
    )
    budget: str = _setting(
        "auto", "Memory the run may take; the plan keeps to it, and on a GPU it is enforced. auto = what is free of the device.",
        'auto or a size such as "8GB"'
    )
    checkpointing: Literal["auto"] | bool = _setting(
        "auto", "Recompute activations in the backward pass: slower, far less memory. auto = only where memory asks for it.",
        "auto, true or false",
    )

    streaming: _AutoBool = _setting(
        "auto", "Layers that do not fit on the device come to it when they are needed, from RAM or disk. auto = only where "
        "the model would not fit otherwise.", "auto, true or false",
    )
    resident_layers: _Auto | _CountInt = _setting(
        "auto", "Layers that stay on the device while others are streamed. auto = as many as fit.", "auto or a whole number from 0"
    )
    visit_micro_batches: _Auto | _PositiveInt = _setting(
        "auto", "Micro-batches that go through a streamed layer in one visit. auto = all of a step, as far as RAM holds their hidden "
        "states.", "auto or a whole number from 1",
    )
    stream_from: Literal["auto", "ram", "disk"] = _setting(
        "auto", "Where streamed layers wait. auto = RAM if it holds them, else disk.", "auto, ram or disk"
    )
    embedding_device: Literal["auto", "device", "host"] = _setting(
        "auto", "Where the input embedding is looked up. host = in RAM or the file, which spares the device its table. Exact.",
        "auto, device or host",
    )
    head_format: Literal["auto", "resident", "streamed", "int8", "nf4"] = _setting(
        "auto", "The output head: on the device, or brought there tile by tile; int8 and nf4 are smaller and not exact, and only "
        "taken where they are asked for.", "auto, resident, streamed, int8 or nf4",
    )
    loss_chunk: str = _setting(
        "auto", "Logits that exist at once in the project's own chunked loss; none = TRL's loss. auto = TRL's on a GPU, unless memory "
        "asks for less; on a CPU 128MiB, which is faster.", 'auto, none or a size such as "64MiB"',
    )
    offload_activations: _AutoBool = _setting(
        "auto", "Hidden states between layers wait in RAM. Exact, and slower by little. auto = only where memory asks for it.",
        "auto, true or false",
    )
    offload_adapters: _AutoBool = _setting(
        "auto", "Adapters, their gradients and the optimizer live in RAM. Exact. auto = only where memory asks for it.",
        "auto, true or false",
    )
    fused_lora: Literal["auto", "projections"] | bool = _setting(
        "auto", "Backward pass of adapted projections, MLPs and norms written by hand: about half the activations; rounds differently "
        "from PEFT. projections = of these alone, for speed. auto = only where memory asks for it; on a CPU at least projections.",
        "auto, projections, true or false",
    )
    mlp_tile: _Auto | Literal["none"] | _PositiveInt = _setting(
        "auto", "Tokens that go through an MLP at once; fewer = less memory, more time. auto = all, unless memory asks for less.",
        "auto, none or a whole number of tokens from 1",
    )
    dequantise_once: _AutoBool = _setting(
        "auto", "A streamed layer's weights are kept in 16 bits for all micro-batches of a visit. auto = where there is room.",
        "auto, true or false",
    )
    cache_base: _AutoBool = _setting(
        "auto", "Keep the quantised base on disk, so that the next start takes seconds; `qlora cache` shows and clears it. auto = "
        "for streamed bases, and for others from 500 million parameters on.", "auto, true or false",
    )

    @field_validator("budget")
    @classmethod
    def _budget_has_a_unit(cls, value: str) -> str:
        if value != "auto":
            parse_size(value)
        return value

    @field_validator("loss_chunk")
    @classmethod
    def _loss_chunk_is_a_size(cls, value: str) -> str:
        if value not in ("auto", "none"):
            parse_size(value)
        return value


class OutputSection(Section):
    """What is left behind."""

    dir: str = _setting("auto", "Run folder. auto = runs/<name of the recipe>.", "auto or a folder")


class HubSection(Section):
    """Where the adapter is pushed when the run has ended; without this section nothing leaves the machine."""

    repo: str = _setting(..., "Repository of the adapter; without an owner it is yours.", "name or owner/name")
    private: bool = _setting(True, "Only you, or your organisation, can see the repository.", "true or false")
    required: bool = _setting(
        True, "Stop before training where the push cannot succeed: no token, a token that may only read, another's repository. "
        "false = warn, train, and try all the same.", "true or false"
    )
    revision: str = _setting("main", "Branch that is pushed to; made if it is not there.", "text")
    tag: str | None = _setting(None, "Name for this version, such as v1. A tag that is there is never moved.", "text")
    base_model: str | None = _setting(
        None, "What the base is called on the Hub, where model.base is a folder; so that others can find it.", "owner/name"
    )
    samples: bool = _setting(
        False, "Push the report's held-out prompts and answers as well. They are rows of your data.", "true or false"
    )
    max_minutes: Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)] = _setting(
        60.0, "Give the push up after so long; the run is on disk, and `qlora push` finishes it.", "a number of minutes above 0"
    )


# The setting that a section stands for where a person writes a single text: `model: builtin:tiny`.
SHORTHANDS = {"model": "base", "data": "path", "output": "dir", "hub": "repo"}
SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection, "data": DataSection, "lora": LoraSection, "train": TrainSection,
    "memory": MemorySection, "output": OutputSection, "hub": HubSection,
}


@dataclass(frozen=True)
class SettingDoc:
    """One line of help: everything a person needs to use a setting."""

    key: str
    default: str
    expects: str
    help: str


def describe_settings() -> list[SettingDoc]:
    """Every setting, in order, from the declarations above."""
    docs = []
    for section, cls in SECTIONS.items():
        for name, field in cls.model_fields.items():
            default = "required" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True)
            default = default.replace("\n...", "").strip()
            docs.append(SettingDoc(f"{section}.{name}", default, field.json_schema_extra["expects"], field.description or ""))
    return docs
