"""Packing is only allowed where rows do not see each other, and that is tried out rather than assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora.errors import RecipeError

if TYPE_CHECKING:
    from qlora.training.trainer import AdapterTrainer

_LENGTH = 12
# Two rows packed and isolated differ from the rows alone by rounding; rows that see each other differ by far more.
_ROUNDING_SHARE = 0.2


def verify_packing(trainer: AdapterTrainer) -> None:
    """Run two short rows packed, alone, and run together on purpose, through the real collator and model.

    Raises:
        RecipeError: in this model the second row's logits depend on the first row.
    """
    import torch

    model = trainer.model
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (2 * _LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = ids[:_LENGTH], ids[_LENGTH:]
    packed = trainer.data_collator(
        [{"input_ids": ids, "labels": ids, "seq_lengths": [_LENGTH, _LENGTH]}]
    )
    packed.pop("labels")

    def logits(**inputs: torch.Tensor) -> torch.Tensor:
        on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return model(**on_device, use_cache=False).logits[0, -_LENGTH:].float()

    was_training = model.training
    model.eval()
    with torch.no_grad():
        alone = logits(input_ids=torch.tensor([second]))
        isolated = (logits(**packed) - alone).abs().mean()
        mixed = (logits(input_ids=torch.tensor([first + second])) - alone).abs().mean()
    model.train(was_training)
    if not isolated <= _ROUNDING_SHARE * mixed:
        raise RecipeError(
            f"data.packing is on, but in this model a packed row sees the row before it (its logits move by {isolated:.3g}, "
            f"against {mixed:.3g} for rows simply joined).",
            "Set data.packing: false.",
        )
