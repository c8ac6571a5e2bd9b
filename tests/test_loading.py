"""What loading is said to allocate, against transformers' loader at work on small checkpoints."""

import pytest
import torch

from qlora.model.build import quantisation
from qlora.model.meta import build_base_on_meta
from qlora.planning.loading import in_loading_order, loading_host_bytes, record_loading
from qlora.planning.trace import Recorder
from qlora.precision import Precision

BF16 = Precision("bf16", "bf16", False, "a test")
TRIFLE_BYTES = 8192  # tables, means and norms come and go unnoticed
SIZES = {
    "llama": dict(vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=12, num_attention_heads=4,
                  num_key_value_heads=2),
    "gpt2": dict(vocab_size=1000, n_embd=256, n_layer=2, n_head=4),
    "qwen3_moe": dict(vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=512, head_dim=64),
}


def small_config(family):
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **SIZES[family])


def turns(events):
    """The sum of live bytes wherever it turns from growing to shrinking or back."""
    live, found, growing = 0, [], True
    for size in (event.size_bytes for event in events if abs(event.size_bytes) >= TRIFLE_BYTES):
        if (size > 0) != growing:
            found.append(live)
            growing = size > 0
        live += size
    return [*found, live]


def load_for_real(folder):
    """Storages that the loader makes on a CPU, less those that are views of the mapped file."""
    from transformers import AutoModelForCausalLM

    recorder = Recorder("cpu")
    with recorder, recorder.during("load", "base"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=quantisation(BF16),
        )
    return [event for event in recorder.trace() if "set_" not in event.op], model


@pytest.mark.parametrize("family", SIZES)
def test_the_loader_does_what_is_recorded(family, tmp_path):
    from transformers import AutoModelForCausalLM

    config = small_config(family)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)  # cast on the way, as on CUDA
    real, model = load_for_real(tmp_path)
    recorder, base = Recorder("meta"), build_base_on_meta(config, precision=BF16)
    record_loading(recorder, base, warm_up=False)
    assert turns(recorder.trace()) == turns(real)
    assert len(turns(real)) > 15
    del model, base  # until here nothing of them may be released


def test_warm_up_and_its_limit():
    base = build_base_on_meta(small_config("llama"), precision=BF16)
    whole, capped = Recorder("meta"), Recorder("meta")
    record_loading(whole, base)
    first = whole.trace()[0].size_bytes
    assert first == sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    record_loading(capped, base, device_bytes=int(1.2 * 2**30) + 2**20)
    assert capped.trace()[0].size_bytes == pytest.approx(2**20, abs=1)


def test_layers_go_in_natural_order():
    names = [name for name, _ in in_loading_order(build_base_on_meta(small_config("llama"), precision=BF16))]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers) and layers[-1] == 11
    assert names[0] == "lm_head.weight" and names[-1] == "model.norm.weight"


def test_host_memory_is_that_of_the_largest_tensor():
    llama = build_base_on_meta(small_config("llama"), precision=BF16)
    assert loading_host_bytes(llama) == 4 * 1000 * 256
    experts = build_base_on_meta(small_config("qwen3_moe"), precision=BF16)
    assert loading_host_bytes(experts) == 4 * 1000 * 256  # experts are read one by one


def test_everything_recorded_is_still_there():
    base = build_base_on_meta(small_config("qwen3_moe"), precision=BF16)
    recorder = Recorder("meta")
    record_loading(recorder, base)
    before = sum(event.size_bytes for event in recorder.trace())
    for tensor in (*base.parameters(), *base.buffers()):
        recorder.track(tensor, "base")  # counts what was not counted
    assert sum(event.size_bytes for event in recorder.trace()) == before
