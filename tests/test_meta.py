"""The base on meta against the real one: modules of the same classes, tensors of the same types and bytes, part by part."""

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from truth import CPU, PRECISIONS, save_base

from qlora.architecture import describe, select_targets
from qlora.model.adapt import add_adapters
from qlora.model.build import build_base
from qlora.model.meta import build_base_on_meta, keep_layers, quantisation_tensors

ROUND = {"num_hidden_layers": 2, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
# Weights of 68 x 72, 68 x 90 and the like: no multiple of 64 numbers, nor their blocks of 256.
ODD = {**ROUND, "hidden_size": 68, "intermediate_size": 90, "num_attention_heads": 4, "num_key_value_heads": 2,
       "head_dim": 18}
SHAPES = {
    "llama": ("llama", {**ROUND, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4,
                        "num_key_value_heads": 2}),
    "llama, odd sizes": ("llama", ODD),
    "llama, tied and with biases": ("llama", {**ODD, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {**ROUND, "hidden_size": 192, "intermediate_size": 500, "num_attention_heads": 6,
                        "num_key_value_heads": 2}),
    "qwen3": ("qwen3", ODD),
    "gemma2": ("gemma2", ODD),
    "gemma3": ("gemma3_text", {**ODD, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", {**ROUND, "hidden_size": 68, "intermediate_size": 90, "num_attention_heads": 2,
                      "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 68, "vocab_size": 512, "n_positions": 128, "bos_token_id": 1,
                      "eos_token_id": 2}),
}


def config_of(name):
    from transformers import AutoConfig

    family, sizes = SHAPES[name]
    return AutoConfig.for_model(family, **sizes)


@pytest.fixture(scope="module", params=SHAPES)
def both(request, tmp_path_factory):
    """The real base, the one on meta, and their config. In bf16."""
    config, folder = config_of(request.param), tmp_path_factory.mktemp("base")
    save_base(config, folder)
    settings = dict(precision=PRECISIONS["bf16"], attention="eager")
    real = build_base(str(folder), config, device=CPU, **settings)
    return real, build_base_on_meta(config, **settings), config


def storages(tensors):
    """Bytes of the storages of tensors, shared ones once."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None}
    return sum(found.values())


def quantised(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def outline(model):
    """Everything but the values: modules by name, and types, shapes and flags of all tensors."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [(name, type(t), t.dtype, t.shape, t.requires_grad)
               for named in (model.named_parameters, model.named_buffers) for name, t in named(remove_duplicate=False)]
    states = [(tensor.dtype, tensor.shape) for module in quantised(model) for tensor in quantisation_tensors(module)]
    flags = [(m.compute_dtype, m.quant_state.dtype, m.quant_state.shape, m.quant_state.blocksize, m.quant_state.nested,
              m.support_avx512bf16_for_cpu) for m in quantised(model)]
    return modules, tensors, states, flags


def test_modules_and_types_are_those_of_the_real_build(both):
    real, simulated, _ = both
    for found, expected in zip(outline(simulated), outline(real)):
        assert found == expected
    assert all(parameter.is_meta for parameter in simulated.parameters())
    assert quantised(real)


def test_every_part_has_the_bytes_of_the_real_build(both):
    real, simulated, config = both
    for part in (
        lambda model: [module.weight for module in quantised(model)],
        lambda model: [module.quant_state.absmax for module in quantised(model)],
        lambda model: [tensor for module in quantised(model) for tensor in quantisation_tensors(module)],
        lambda model: model.parameters(),
        lambda model: model.buffers(),
        lambda model: [model.get_input_embeddings().weight],
        lambda model: [model.get_output_embeddings().weight],
        lambda model: [model.get_input_embeddings().weight, model.get_output_embeddings().weight],
    ):
        assert storages(part(simulated)) == storages(part(real)) >= 0
    assert describe(config).quantised_bytes == storages(
        tensor for module in quantised(real) for tensor in (module.weight, *quantisation_tensors(module))
    )


@pytest.mark.parametrize("double_quant", [True, False])
def test_one_weight_is_what_bitsandbytes_makes_of_it(double_quant):
    """From less than a block of numbers to more than a block of scales."""
    from qlora.model.meta import give_nf4_weight

    for rows, columns in ((3, 14), (64, 64), (129, 130), (257, 66)):
        settings = dict(bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=double_quant)
        real = bnb.nn.Linear4bit(columns, rows, **settings).to(torch.bfloat16).to("cpu")
        simulated = bnb.nn.Linear4bit(columns, rows, device="meta", **settings)
        give_nf4_weight(simulated, torch.bfloat16, double_quant=double_quant)
        for found, expected in zip([simulated.weight, *quantisation_tensors(simulated)],
                                   [real.weight, *quantisation_tensors(real)], strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_adapters_and_optimizer_state_have_the_bytes_of_the_real_run(both, optimizer, tmp_path):
    """Real: the trainer's own optimizer after a step. Simulated: what a rehearsal holds at its end, by part."""
    from truth import Cell, stand_in_tokenizer, rows

    from qlora.training.rehearsal import Batches, rehearse
    from qlora.training.trainer import as_dataset, build_trainer

    base, _, config = both
    cell = Cell("", r=7, length=16, optimizer=optimizer, attention="eager")
    selection = select_targets(describe(config))
    events = rehearse(config, selection, precision=cell.precision, device=CPU, settings=cell.settings(),
                      batches=Batches(1, 1, 16), phases=("train",))
    kept = {part: sum(event.size_bytes for event in events if event.part == part) for part in {e.part for e in events}}

    real = add_adapters(base, selection, r=7, alpha=7, seed=0, dtype=torch.bfloat16)
    try:
        trainer = build_trainer(
            real, stand_in_tokenizer(), as_dataset(rows(cell, 1)), None, folder=tmp_path, settings=cell.settings(),
            precision=cell.precision, device=CPU, num_steps=1, on_row=lambda row: None,
        )
        adapters = [parameter for parameter in real.parameters() if parameter.requires_grad]
        for parameter in adapters:
            parameter.grad = torch.ones_like(parameter)
        trainer.create_optimizer().step()
        state = [value for values in trainer.optimizer.state.values() for value in values.values()
                 if isinstance(value, torch.Tensor)]
        frozen = [tensor for tensor in (*real.parameters(), *real.buffers()) if not tensor.requires_grad]
        frozen += [tensor for module in quantised(real) for tensor in quantisation_tensors(module)]
    finally:
        real.unload()
    assert kept["adapters"] == storages(adapters)
    assert kept["optimizer"] == storages(state)
    assert kept["base"] + kept.get("embeddings", 0) + kept.get("head", 0) == storages(frozen)


def test_kept_layers_are_the_first_ones():
    config = config_of("qwen3")
    whole = build_base_on_meta(config, precision=PRECISIONS["bf16"])
    cut = build_base_on_meta(config, precision=PRECISIONS["bf16"], num_layers=1)
    assert len(cut.model.layers) == 1 and len(whole.model.layers) == 2
    keep_layers(whole, 1)
    assert outline(whole) == outline(cut)
