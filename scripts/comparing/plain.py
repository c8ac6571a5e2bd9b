"""What a user writes by hand with Transformers, PEFT, bitsandbytes and TRL; and Unsloth, which is used the same way.

The runner of Unsloth was written from its documentation (docs.unsloth.ai, "Fine-tuning guide"; TRL's page on the integration)
and was not run here: it needs a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparing.contenders import LOGITS, UNSLOTH, Contender
from comparing.work import TARGETS, Work


def make_trainer(contender: Contender, work: Work, max_steps: int, spent: dict[str, float]) -> Any:
    """A 4-bit base with fresh adapters, and a trainer with the contender's settings. Its stages are not told apart."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    torch.manual_seed(work.seed)
    tokenizer = AutoTokenizer.from_pretrained(work.checkpoint)
    rows = work.rows()
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    settings: dict[str, Any] = dict(
        output_dir=str(Path(work.folder) / contender.name), per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=1,
        max_steps=max_steps, learning_rate=work.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, seed=work.seed,
        data_seed=work.seed, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(), **contender.settings,
    )
    if contender.kind == LOGITS:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        return Trainer(_adapted(work), TrainingArguments(**settings), train_dataset=dataset,
                       data_collator=DataCollatorForSeq2Seq(tokenizer))
    if contender.kind == UNSLOTH:
        import unsloth  # noqa: F401  (must be imported before trl)
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    if contender.kind == UNSLOTH:
        return SFTTrainer(_of_unsloth(work), config, train_dataset=dataset, processing_class=tokenizer)
    return SFTTrainer(_base(work), config, train_dataset=dataset, processing_class=tokenizer, peft_config=_lora(work))


def _base(work: Work) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        work.checkpoint, quantization_config=quantisation, dtype=torch.bfloat16, attn_implementation="sdpa",
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )


def _lora(work: Work) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=work.rank, lora_alpha=work.rank, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM")


def _adapted(work: Work) -> Any:
    """Adapters in 16 bits, as TRL makes them of a 4-bit base."""
    import torch
    from peft import get_peft_model

    base = _base(work)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(base, _lora(work), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _of_unsloth(work: Work) -> Any:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(work.checkpoint), max_seq_length=work.length, load_in_4bit=True)
    return FastLanguageModel.get_peft_model(
        model, r=work.rank, lora_alpha=work.rank, lora_dropout=0, bias="none", target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth", random_state=work.seed,
    )
