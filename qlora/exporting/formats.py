"""The formats of numbers that are written into a GGUF file: those that gguf-py can quantise without a compiler."""

from __future__ import annotations

from dataclasses import dataclass

from qlora.errors import RecipeError


@dataclass(frozen=True)
class Format:
    """How a model's numbers are stored.

    Attributes:
        matrices, embeddings: GGML's names of the types of ordinary matrices, and of the embedding and the head. Vectors and norms
            are always F32.
        file_type: llama.cpp's number for it (`general.file_type`).
        bits: of a number of a matrix, scales included.
        max_kl: what the mean KL(merged || exported) may be, in nats a token, before an export fails.
        about: for people.
    """

    name: str
    matrices: str
    embeddings: str
    file_type: int
    bits: float
    max_kl: float
    about: str


# The thresholds: scripts/prove_gguf.py --thresholds printed the mean KL of each format on the models that are at hand (the table
# is in README.md beside this file, with its date). Each is some three times the largest found there or more; of f32 and f16 it is
# what the rounding of the merged model itself may be (qlora/merging/checking.py). Models that are tiny or pure noise suffer most.
FORMATS = {
    each.name: each for each in (
        Format("f32", "F32", "F32", 0, 32, 0.002, "every number as it was merged"),
        Format("f16", "F16", "F16", 1, 16, 0.002, "as good as the merged model, half of f32"),
        Format("bf16", "BF16", "BF16", 32, 16, 0.004, "as bf16 bases have it"),
        Format("q8_0", "Q8_0", "Q8_0", 7, 8.5, 0.01, "a quarter of f32, hardly a difference"),
        Format("q5_1", "Q5_1", "Q8_0", 9, 6, 0.35, "5 bits and an offset in blocks of 32"),
        Format("q5_0", "Q5_0", "Q8_0", 8, 5.5, 0.35, "5 bits in blocks of 32"),
        Format("q4_1", "Q4_1", "Q8_0", 3, 5, 1.2, "4 bits and an offset in blocks of 32"),
        Format("q4_0", "Q4_0", "Q8_0", 2, 4.5, 1.2, "4 bits in blocks of 32; measure before you trust it"),
    )
}
# Of each tensor that is read back: the root mean square of what is off, as a share of the numbers' own. Of normally distributed
# numbers it is 0.005 for Q8_0, 0.04 for Q5_0 and 0.09 for Q4_0; the rest is room for outliers. Rows in a wrong place have 1.4.
MAX_SHARE = {"F32": 1e-6, "F16": 1e-3, "BF16": 0.01, "Q8_0": 0.03, "Q5_0": 0.2, "Q5_1": 0.2, "Q4_0": 0.4, "Q4_1": 0.4}
DEFAULT = "q8_0"
ADAPTER_FORMATS = ("f16", "f32", "bf16")


def find_format(name: str) -> Format:
    """The format of that name, in capitals or not.

    Raises:
        RecipeError: it is not one that can be written here.
    """
    found = FORMATS.get(name.lower())
    if found is not None:
        return found
    written = ", ".join(FORMATS)
    if name.lower().startswith(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq", "tq", "mxfp4", "nvfp4")):
        raise RecipeError(f"{name} is written by llama.cpp's own quantiser alone; here: {written}.",
                          f"Export f16, and then: llama-quantize NAME-F16.gguf NAME-{name.upper()}.gguf {name.upper()}")
    raise RecipeError(f"There is no GGUF format {name!r} here.", f"Take one of {written}.")


def type_of(name: str, shape: tuple[int, ...], form: Format) -> str:
    """GGML's name of the type that a tensor is written in.

    llama.cpp computes with vectors, norms and learnt positions in F32 only. Rows that a format's blocks of 32 do not divide
    are F16, as in llama.cpp's own converter.
    """
    if len(shape) < 2 or name.endswith("_norm.weight") or name.startswith(("position_embd", "rope_")):
        return "F32"
    wanted = form.embeddings if name in ("token_embd.weight", "output.weight") else form.matrices
    return "F16" if wanted.startswith("Q") and shape[-1] % 32 else wanted
