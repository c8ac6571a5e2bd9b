"""Peers that are whole programs: Axolotl and LitGPT, run from their command lines.

They cannot be told to wait between blocks, so each is run twice, for few and for more steps; the difference of the two times is
what the further steps take. Losses are not read. NOT RUN HERE: they need a GPU. Written from Axolotl's configuration reference
(docs.axolotl.ai/docs/config-reference.html) and LitGPT's `config_hub/finetune/tiny-llama/qlora.yaml` and
`tutorials/finetune_lora.md`.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparing.contenders import AXOLOTL, Contender
from comparing.work import TARGETS, Work

FEW_STEPS, MORE_STEPS = 2, 10


def run_program(contender: Contender, work: Work, environment: Mapping[str, str], log: Path, timeout: float) -> dict[str, Any]:
    """What `comparing.tables.row_of` wants to know.

    Returns:
        {"why_not": ...} where the program fails.
    """
    folder = Path(work.folder) / contender.name
    folder.mkdir(exist_ok=True)
    seconds = {}
    try:
        for command in _preparations(contender, work, folder):
            _run(command, environment, log, timeout)
        for num_steps in (FEW_STEPS, MORE_STEPS):
            began = time.monotonic()
            _run(_training(contender, work, folder, num_steps), environment, log, timeout)
            seconds[num_steps] = time.monotonic() - began
    except (OSError, subprocess.SubprocessError) as error:
        return {"why_not": f"failed: {error}; see {log.name}"}
    each = (seconds[MORE_STEPS] - seconds[FEW_STEPS]) / (MORE_STEPS - FEW_STEPS)
    if each <= 0:
        return {"why_not": "failed: more steps took no longer than few"}
    return {"blocks": [[{"seconds": each}]]}


def _run(command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float) -> None:
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, timeout=timeout,
                       check=True)


def _preparations(contender: Contender, work: Work, folder: Path) -> list[list[str]]:
    if contender.kind == AXOLOTL:
        rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in work.rows()]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return []
    texts = [json.loads(line)["text"] for line in work.text_file.read_text(encoding="utf-8").splitlines()]
    (folder / "rows.json").write_text(json.dumps([{"instruction": "", "output": text} for text in texts]), encoding="utf-8")
    return [["litgpt", "convert_to_litgpt", str(work.checkpoint)]]


def _training(contender: Contender, work: Work, folder: Path, num_steps: int) -> list[str]:
    return (_axolotl if contender.kind == AXOLOTL else _litgpt)(work, folder, num_steps)


def _axolotl(work: Work, folder: Path, num_steps: int) -> list[str]:
    import yaml

    config = {
        "base_model": str(work.checkpoint), "load_in_4bit": True, "adapter": "qlora", "lora_r": work.rank,
        "lora_alpha": work.rank,
        "lora_dropout": 0.0, "lora_target_modules": list(TARGETS), "sequence_len": work.length, "sample_packing": False,
        # No type: rows that have input_ids, attention_mask and labels are taken as they are.
        "datasets": [{"path": str(folder / "rows.jsonl"), "ds_type": "json", "type": ""}],
        "dataset_prepared_path": str(folder / "prepared"), "val_set_size": 0, "output_dir": str(folder / f"out-{num_steps}"),
        "micro_batch_size": work.micro_batch, "gradient_accumulation_steps": 1, "max_steps": num_steps,
        "optimizer": "adamw_torch_fused",
        "learning_rate": work.learning_rate, "lr_scheduler": "constant", "weight_decay": 0.0, "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "seed": work.seed, "logging_steps": 1, "save_strategy": "no",
        "special_tokens": {"pad_token": "<pad>"},
    }
    path = folder / f"config-{num_steps}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return ["axolotl", "train", str(path)]


def _litgpt(work: Work, folder: Path, num_steps: int) -> list[str]:
    places = ("query", "key", "value", "projection", "mlp")
    return [
        "litgpt", "finetune_lora", str(work.checkpoint), "--quantize", "bnb.nf4-dq", "--precision", "bf16-true", "--devices", "1",
        "--lora_r", str(work.rank), "--lora_alpha", str(work.rank), "--lora_dropout", "0",
        *(f"--lora_{place}=true" for place in places),
        "--data", "JSON", "--data.json_path", str(folder / "rows.json"), "--data.val_split_fraction", "0.05",
        "--train.max_steps", str(num_steps), "--train.global_batch_size", str(work.micro_batch),
        "--train.micro_batch_size", str(work.micro_batch), "--train.max_seq_length", str(work.length), "--train.lr_warmup_steps",
        "0",
        "--out_dir", str(folder / f"out-{num_steps}"), "--seed", str(work.seed),
    ]
