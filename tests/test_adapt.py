"""Adapters on real NF4 bases of five families, built small from their configs and quantised by the real loader."""

import dataclasses
import warnings

import pytest

torch = pytest.importorskip("torch")

from qlora.architecture import describe, lora_parameters, select_targets
from qlora.errors import VerificationError
from qlora.model.adapt import add_adapters, verify_adapters

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 128}
FAMILIES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, **SIZES},
    "phi3": {"hidden_size": 64, "intermediate_size": 96, "original_max_position_embeddings": 128, "pad_token_id": 0,
             **SIZES},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 128},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 96, **SIZES},
    "falcon": {"hidden_size": 64, **SIZES},  # its FalconLinear is no plain nn.Linear: transformers leaves it in 16 bit
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
                  "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16, **SIZES},
}
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random bf16 model of each family on disk, and its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}
    for family, settings in FAMILIES.items():
        config = AutoConfig.for_model(family, **settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        folders[family] = (tmp_path_factory.mktemp(family), config)
        model.save_pretrained(folders[family][0])
    return folders


def build(folders, family, four_bit=True):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folders[family][0], quantization_config=nf4 if four_bit else None, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its packed kernel wants out_features % 32 == 0
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def fill_b(model, seed=1):
    """B that is not zero, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(noise)


def adapt(model, config, targets="all", r=4, dtype=torch.bfloat16, seed=3, **settings):
    selection = select_targets(describe(config), targets)
    return add_adapters(model, selection, r=r, alpha=2 * r, seed=seed, dtype=dtype, **settings), selection


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_leave_every_logit_as_it_was(folders, family):
    model, config = build(folders, family), folders[family][1]
    before = logits(model)
    frozen = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    adapted, selection = adapt(model, config)
    assert torch.equal(logits(adapted), before)
    verify_adapters(adapted, selection, 4, dtype=torch.bfloat16)
    after = {name.replace("base_model.model.", "").replace(".base_layer", ""): (p.dtype, p.data_ptr())
             for name, p in adapted.named_parameters() if not p.requires_grad}
    assert after == frozen  # nothing was cast or copied, the embeddings and the head least of all
    fill_b(adapted)
    assert not torch.equal(logits(adapted), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_is_what_the_loader_builds(folders, family):
    import bitsandbytes as bnb

    model, architecture = build(folders, family), describe(folders[family][1])
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert architecture.num_quantised_modules == len(layers)
    assert bool(layers) == (family != "falcon")
    assert architecture.quantised_parameters == sum(m.in_features * m.out_features for m in layers)
    storages = {}
    for module in layers:
        state = module.weight.quant_state
        scales = (state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code)
        for tensor in (module.weight.data, *scales):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert architecture.quantised_bytes == sum(storages.values())
    assert bool(architecture.kept_linear) == (family == "falcon")
    rest = sum(p.numel() for n, p in model.named_parameters() if type(p).__name__ != "Params4bit")
    assert architecture.num_parameters == architecture.quantised_parameters + rest


def test_the_same_seed_gives_the_same_adapters(folders):
    config = folders["llama"][1]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    adapters = []
    for seed in (3, 3, 4):
        adapted, _ = adapt(build(folders, "llama"), config, seed=seed)
        adapters.append({n: p for n, p in adapted.named_parameters() if p.requires_grad})
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = adapters
    assert all(torch.equal(first[name], again[name]) for name in first)
    halves = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in halves)
    for name in halves:  # Kaiming-uniform with a = sqrt(5): bound 1 / sqrt(in)
        assert 0.8 < first[name].abs().max().item() * first[name].shape[1] ** 0.5 <= 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_have_the_type_that_was_asked_for(folders, dtype):
    adapted, selection = adapt(build(folders, "llama"), folders["llama"][1], dtype=dtype, dropout=0.05)
    verify_adapters(adapted, selection, 4, dtype=dtype)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {dtype}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_means_the_same_on_the_16_bit_model(folders, family, tmp_path):
    """Trained on the 4-bit base, loaded on the plain one: for GPT-2 across Linear4bit and transposed Conv1D weights."""
    import bitsandbytes as bnb
    from peft import PeftModel

    adapted, _ = adapt(build(folders, family), folders[family][1])
    fill_b(adapted)
    adapted.save_pretrained(tmp_path)
    plain = build(folders, family, four_bit=False)
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            target = plain.get_submodule(name.removesuffix(".base_layer"))
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            target.weight.data = (weight.T if type(target).__name__ == "Conv1D" else weight).contiguous()
    base = logits(plain.float()).clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")  # PEFT warns when it has to correct it
        loaded = PeftModel.from_pretrained(plain, tmp_path).float()
    expected, plain_logits = logits(adapted).float(), logits(loaded)
    effect = (plain_logits - base).abs().max()
    assert effect > 0.05
    assert (plain_logits - expected).abs().max() < 0.1 * effect  # bf16 against fp32
    torch.testing.assert_close(logits(loaded.merge_and_unload()), plain_logits, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapters_only(folders):
    adapted, _ = adapt(build(folders, "gpt2").train(), folders["gpt2"][1])
    fill_b(adapted)
    adapted(IDS, labels=IDS).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0


def test_a_base_on_meta_gets_adapters_on_meta(folders):
    from transformers import AutoModelForCausalLM

    config = folders["llama"][1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapted, selection = adapt(model, config, r=8)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in trainable)
    assert sum(p.numel() for p in trainable) == lora_parameters(selection, 8)


def test_verification_names_every_difference(folders):
    config = folders["llama"][1]
    adapted, selection = adapt(build(folders, "llama"), config)
    verify_adapters(adapted, selection, 4)
    with pytest.raises(VerificationError, match="parameters are trainable, planned were"):
        verify_adapters(adapted, selection, 8)
    with pytest.raises(VerificationError, match="in bfloat16; planned was float16"):
        verify_adapters(adapted, selection, 4, dtype=torch.float16)
    with pytest.raises(VerificationError, match="14 modules of the base are 4-bit, planned were 15"):
        verify_adapters(adapted, selection, 4, num_quantised=15)
    partly = select_targets(selection.architecture, "attention")
    more = dataclasses.replace(selection, projections=(*partly.projections, *selection.projections[4:]))
    verify_adapters(adapted, more, 4)
    with pytest.raises(VerificationError, match="parameters are trainable"):
        verify_adapters(adapted, partly, 4)
    adapted.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(VerificationError) as error:
        verify_adapters(adapted, selection, 4)
    assert "are no adapters, the first is" in str(error.value) and "embed_tokens" in str(error.value)


def test_a_plain_base_is_not_taken_for_a_4_bit_one(folders):
    adapted, selection = adapt(build(folders, "llama", four_bit=False), folders["llama"][1])
    with pytest.raises(VerificationError, match="0 modules of the base are 4-bit, planned were 14"):
        verify_adapters(adapted, selection, 4)
    verify_adapters(adapted, selection, 4, num_quantised=0)
