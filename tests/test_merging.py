"""An adapter merged into its base: against PEFT's own merge, against base and adapter together, and never half done."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_shapes
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlora.merging
from qlora.catalog.lookup import find_config
from qlora.errors import BusyError, ModelError, OutputError, VerificationError
from qlora.hub.adapter import RunRecord
from qlora.hub.fetch import find_adapter
from qlora.merging import checking, merge, shards, streamed
from qlora.merging.adapter import read_adapter
from qlora.merging.base import list_tensors
from qlora.progress import Progress


@pytest.fixture(scope="module", params=tiny_shapes.SHAPES)
def shape(request, tmp_path_factory, small_model):
    """A base in fp32: separate and shared embeddings, norms around both parts, matrices the other way round."""
    return tiny_shapes.save_shape(request.param, tmp_path_factory.mktemp("bases") / request.param, small_model, 2)


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_adapter(base, folder, *, tokenizer=None, **settings):
    """An adapter on all projections whose B is not zero, as PEFT saves it; returns its folder."""
    from peft import LoraConfig, get_peft_model

    model = load(base)
    names = {"target_modules": "all-linear"} if "target_modules" not in settings else {}
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **names, **settings},
                        fan_in_fan_out=model.config.model_type == "gpt2")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    adapted.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
    if tokenizer is not None:
        for path in tokenizer.glob("*token*"):
            shutil.copy(path, folder)
    return folder


def edit(path, **values):
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, **values}), encoding="utf-8")


def peft_merge(base, adapter):
    """PEFT's own, in memory."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().eval()


def tensors_of(folder):
    return {name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()}


def as_run(adapter, dtype="fp32"):
    """The adapter as one of a run that computed in this type."""
    found = find_adapter(str(adapter))
    record = RunRecord(adapter, False, {"settings": {"model.dtype": {"value": dtype}}})
    return type(found)(found.name, found.folder, found.base, found.base_revision, found.revision, record)


def in_bf16(base, folder):
    """The same base with its weights in bf16."""
    load(base, torch.bfloat16).save_pretrained(folder)
    return folder


def logits(model):
    ids = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- the numbers -------------------------------------------------------------------------------------------------------


def test_in_fp32_it_is_what_peft_merges_to_the_last_bit(shape, tmp_path):
    adapter = make_adapter(shape, tmp_path / "adapter")
    found = merge(find_adapter(str(adapter)), tmp_path / "out")
    wanted, written, before = peft_merge(shape, adapter).state_dict(), tensors_of(tmp_path / "out"), tensors_of(shape)
    # Names are the checkpoint's own; a shared matrix is there as often as it was.
    assert written.keys() == before.keys()
    changed = {name for name in written if not torch.equal(written[name], before[name])}
    for name, tensor in written.items():
        name = name if name in wanted else f"transformer.{name}"
        assert torch.equal(tensor, wanted[name]), name
    assert len(changed) == found.num_merged == len(read_adapter(adapter).products) > 0
    assert found.comparison.how == "loaded" and found.comparison.exact and found.comparison.max_difference < 1e-4
    assert found.comparison.top1 == 1 and found.comparison.kl_of_adapter > 1e-3
    assert torch.equal(logits(load(tmp_path / "out")), logits(peft_merge(shape, adapter)))


def test_ranks_and_alphas_of_single_modules_and_rslora(small_model, tmp_path):
    adapter = make_adapter(small_model, tmp_path / "adapter", use_rslora=True,
                           rank_pattern={"q_proj": 2, r"layers.1.mlp.up_proj": 6},
                           alpha_pattern={"down_proj": 3, r"1.*v_proj": 20})
    products = read_adapter(adapter).products
    place = "model.layers.{}.{}"
    assert products[place.format(0, "self_attn.q_proj")].scaling == 8 / math.sqrt(2)
    assert products[place.format(1, "mlp.up_proj")].scaling == 8 / math.sqrt(6)
    assert products[place.format(0, "mlp.up_proj")].scaling == 8 / math.sqrt(4)
    assert products[place.format(1, "mlp.down_proj")].scaling == 3 / math.sqrt(4)
    merge(find_adapter(str(adapter)), tmp_path / "out")
    wanted = peft_merge(small_model, adapter).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_bf16_is_rounded_once_and_the_rest_keeps_its_bytes(small_model, tmp_path):
    base = in_bf16(small_model, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    found = merge(find_adapter(str(adapter)), tmp_path / "out")
    before, halves = tensors_of(base), load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors_of(tmp_path / "out").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = before[name]
        if f"{module}.lora_A.weight" in halves:
            wanted = (wanted.float() + (halves[f"{module}.lora_B.weight"] @ halves[f"{module}.lora_A.weight"]) * 2).bfloat16()
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted), name
    assert not found.comparison.exact and found.comparison.kl < checking.MAX_KL_16BIT < found.comparison.kl_of_adapter


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nf4_is_the_quantised_base_and_adapter_of_training(shape, tmp_path, dtype):
    import truth
    from peft import PeftModel

    from qlora.model.build import build_base
    from qlora.precision import Precision

    base = shape if dtype == "fp32" else in_bf16(shape, tmp_path / "base")
    targets = ["c_attn"] if "gpt2" in str(shape) else ["q_proj", "down_proj"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    found = merge(as_run(adapter, dtype), tmp_path / "out", into="nf4", dtype="fp32")
    # bitsandbytes' own layers, with PEFT's on them; not one of the functions of the merge
    precision = Precision("fp32", "fp32", False, "a test")
    quantised = build_base(str(base), find_config(str(base)), device=truth.CPU, precision=precision)
    wanted = logits(PeftModel.from_pretrained(quantised, adapter).eval())
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() < 1e-4 * max(1, wanted.abs().max())
    assert (wanted - logits(peft_merge(base, adapter))).abs().max() > 1e-2, "NF4 makes a difference here"
    assert found.comparison.passes and found.comparison.exact
    # Matrices without an adapter were quantised as well.
    moved = sum(not torch.equal(tensor, tensors_of(base)[name].float()) for name, tensor in tensors_of(tmp_path / "out").items())
    assert moved > found.num_merged


def test_a_real_model_in_16_bits(shared, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(shared / "models" / "stories260K", base)
    base.chmod(0o755)
    adapter = make_adapter(base, tmp_path / "adapter")
    for into in ("16bit", "nf4"):
        found = merge(as_run(adapter, "bf16"), tmp_path / into, into=into, dtype="bf16")
        assert found.comparison.passes and found.comparison.kl < 0.01 * found.comparison.kl_of_adapter
        assert {tensor.dtype for tensor in tensors_of(tmp_path / into).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "nf4/config.json").read_text())["dtype"] == "bfloat16"


def test_rows_at_a_time_give_the_whole(shape, tmp_path, monkeypatch):
    adapter = make_adapter(shape, tmp_path / "adapter")
    merge(find_adapter(str(adapter)), tmp_path / "whole")
    monkeypatch.setattr(shards, "PIECE", 640)  # ten rows of 64
    merge(find_adapter(str(adapter)), tmp_path / "rows")
    whole = tensors_of(tmp_path / "whole")
    for name, tensor in tensors_of(tmp_path / "rows").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-6)


def test_a_head_that_was_saved_whole_takes_the_place_of_the_base_s(small_model, tmp_path):
    adapter = make_adapter(small_model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    merge(find_adapter(str(adapter)), tmp_path / "out")
    head = tensors_of(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(head, peft_merge(small_model, adapter).lm_head.weight)
    assert not torch.equal(head, tensors_of(small_model)["lm_head.weight"])


def test_a_head_with_an_adapter(small_model, tmp_path):
    adapter = make_adapter(small_model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert "lm_head.weight" in read_adapter(adapter).replaced, "PEFT saves the base's as well"
    merge(find_adapter(str(adapter)), tmp_path / "out")
    wanted = peft_merge(small_model, adapter).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors_of(tmp_path / "out").items())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_multimodal_checkpoint_keeps_its_names_and_its_other_parts(small_model, tmp_path, prefix):
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    adapter = make_adapter(small_model, tmp_path / "adapter")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    renamed = {name.replace("model.", prefix, 1) if name.startswith("model.") else f"language_model.{name}": tensor
               for name, tensor in tensors_of(small_model).items()}
    eye = {"vision_tower.patches.weight": torch.arange(12.0).reshape(3, 4), "vision_tower.steps": torch.arange(3)}
    save_file({**renamed, **eye}, base / "model.safetensors", metadata={"format": "pt"})
    merge(find_adapter(str(adapter)), tmp_path / "out")
    written, wanted = tensors_of(tmp_path / "out"), peft_merge(small_model, adapter).state_dict()
    assert written.keys() == renamed.keys() | eye.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in eye.items())
    for ours, theirs in zip(renamed, tensors_of(small_model), strict=True):
        assert torch.equal(written[ours], wanted[theirs]), ours


# --- files -------------------------------------------------------------------------------------------------------------


def test_shards_in_and_shards_out(small_model, tmp_path):
    base = tmp_path / "base"
    load(small_model).save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(find_adapter(str(adapter)), tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    written, wanted = tensors_of(tmp_path / "out"), peft_merge(base, adapter).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in written.items())
    assert written.keys() == tensors_of(base).keys()
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    sizes = []
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            assert file.metadata() == {"format": "pt"} and all(index["weight_map"][name] == path.name for name in names)
        sizes.append((sum(written[name].nbytes for name in names), len(names)))
    assert all(size <= 60_000 or count == 1 for size, count in sizes) and any(size > 60_000 for size, _ in sizes)


def test_types_of_all_widths_are_read_by_the_library(tmp_path):
    given = {"a": torch.arange(3, dtype=torch.int8), "b": torch.randn(2, 5, dtype=torch.float64), "c": torch.randn(3).half(),
             "d": torch.randn(()), "e": torch.zeros(0, 4), "f": torch.tensor([True, False, True])}
    save_file(given, tmp_path / "in.safetensors")
    listed = shards.read_list(tmp_path / "in.safetensors")
    ordered = sorted(listed, key=lambda one: one.name)
    outlines = [shards.Outline(one.name, one.dtype, one.shape, one.size_bytes) for one in ordered]
    of_name = {one.name: one for one in listed}
    shards.write_shard(tmp_path / "out.safetensors", outlines, lambda outline: shards.read_bytes(of_name[outline.name]))
    for one in shards.read_list(tmp_path / "out.safetensors"):  # readers that map the file want whole multiples
        assert one.start % shards.FLOATS.get(one.dtype, 1) == 0, one
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == given.keys() and all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert torch.equal(shards.read_rows(of_name["b"], 1, 5), given["b"][1:]) and shards.read_rows(of_name["d"]) == given["d"]


def test_tokenizer_and_template_are_the_adapter_s(small_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(small_model, base)
    (base / "LICENSE").write_text("do as you like")
    (base / "vocab.txt").write_text("of the base's own tokenizer")
    adapter = make_adapter(base, tmp_path / "adapter", tokenizer=small_model)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    (adapter / "notes.txt").write_text("private")
    merge(find_adapter(str(adapter)), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja", "LICENSE"}
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi|"


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "named"), [
    ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "biases"), ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"something_new": 3}, "something_new"),
    ({"r": 8}, "rank 8"), ({"rank_pattern": {"(": 3}}, "cannot be understood"), ({"r": "many"}, "cannot be understood"),
])
def test_what_is_more_than_a_product_is_refused(small_model, tmp_path, settings, named):
    adapter = make_adapter(small_model, tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter / "adapter_config.json", **settings)
    with pytest.raises(ModelError, match=named.replace("(", r"\(")):
        merge(find_adapter(str(adapter)), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_of_another_base_is_refused(small_model, shared, tmp_path):
    adapter = make_adapter(small_model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="64 x 64|Name that one: --base MODEL"):
        merge(find_adapter(str(adapter), base=str(shared / "models" / "stories260K")), tmp_path / "out")


def test_a_shared_head_is_not_changed(tmp_path, small_model):
    base = tiny_shapes.save_shape("qwen3", tmp_path / "base", small_model, 1)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(ModelError, match=r"lm_head\.weight, which .* shares with model\.embed_tokens"):
        merge(find_adapter(str(adapter)), tmp_path / "out")


def test_a_quantised_or_incomplete_base_is_refused(small_model, tmp_path):
    base = tmp_path / "base"
    load(small_model).save_pretrained(base, max_shard_size="100KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    edit(base / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="fp8"):
        list_tensors("it", base)
    document = json.loads((base / "config.json").read_text())
    document.pop("quantization_config")
    (base / "config.json").write_text(json.dumps(document))
    first = min(base.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot be loaded"):
        merge(find_adapter(str(adapter)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_a_type_cannot_hold_stop_it(small_model, tmp_path):
    adapter = make_adapter(small_model, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    grown = {name: tensor * 1e3 for name, tensor in tensors.items()}
    save_file(grown, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="which F16 cannot"):
        merge(find_adapter(str(adapter)), tmp_path / "out", dtype="fp16")
    tensors[next(iter(tensors))][0, 0] = math.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        merge(find_adapter(str(adapter)), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}, "nothing is left"


# --- whole or not at all -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(small_model, tmp_path_factory):
    return make_adapter(small_model, tmp_path_factory.mktemp("ready") / "adapter", target_modules=["q_proj"])


def test_a_folder_with_something_in_it_stays_as_it_is(ready, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        merge(find_adapter(str(ready)), tmp_path / "out")
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part/mine").write_text("mine")
    with pytest.raises(OutputError, match="something else is there"):
        merge(find_adapter(str(ready)), tmp_path / "other")
    assert (tmp_path / "out/mine").read_text() == (tmp_path / "other.part/mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert merge(find_adapter(str(ready)), tmp_path / "empty").folder == tmp_path / "empty"


def test_room_is_asked_for_before_anything_is_written(ready, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(qlora.merging, "_free_memory", lambda: 2**20)
        with pytest.raises(OutputError, match=r"takes .* MiB of RAM; 1\.0 MiB are free"):
            merge(find_adapter(str(ready)), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(OutputError, match=r"takes .* MiB; 1\.0 MiB are free"):
        merge(find_adapter(str(ready)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, sys
from contextlib import contextmanager
from qlora.hub.fetch import find_adapter
from qlora.merging import merge
from qlora.progress import Progress

class Killed(Progress):
    @contextmanager
    def stage(self, text):
        def update(done, total):
            if text.startswith("Merging") and done > total / 2:
                {how}
        yield update

merge(find_adapter(sys.argv[1]), sys.argv[2], progress=Killed())
"""


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "raise KeyboardInterrupt"])
def test_a_merge_that_is_cut_short_starts_anew(ready, tmp_path, how):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", _KILLED.format(how=how), str(ready), str(out)], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGINT), done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"out.part"} if "kill" in how else set())
    assert not list(tmp_path.glob("out.part/*.safetensors")), "no name of a whole file on a half one"
    if left:
        (tmp_path / "out.part/model-00001-of-00009.safetensors").write_text("of a merge with other settings")
    merge(find_adapter(str(ready)), out)
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and not list(out.glob(".*"))
    assert len(list(out.glob("*.safetensors"))) == 1


def test_two_at_once_do_not_meet(ready, tmp_path):
    (tmp_path / "out.part").mkdir()
    with FileLock(tmp_path / "out.part/.qlora-part"), pytest.raises(BusyError):
        merge(find_adapter(str(ready)), tmp_path / "out")


class Damage(Progress):
    """Writes into a finished shard before it is looked at."""

    def __init__(self, part, change):
        self.part, self.change = part, change

    @contextlib.contextmanager
    def stage(self, text):
        if text.startswith("Comparing"):
            tensors = load_file(self.part / "model.safetensors")
            self.change(tensors)
            save_file(tensors, self.part / "model.safetensors", metadata={"format": "pt"})
        yield lambda done, total: None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_that_differs_fails_and_is_kept_aside(small_model, tmp_path, dtype):
    base = small_model if dtype == "fp32" else in_bf16(small_model, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    before = tensors_of(base)

    def forget_one(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = before["model.layers.0.mlp.up_proj.weight"]

    for number in ("", "-2"):
        with pytest.raises(VerificationError, match=f"out.differs{number}, to be looked at"):
            merge(find_adapter(str(adapter)), tmp_path / "out", progress=Damage(tmp_path / "out.part", forget_one))
        assert (tmp_path / f"out.differs{number}/config.json").is_file()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_tensors_alone_are_compared_as_well(small_model, tmp_path):
    base = in_bf16(small_model, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(find_adapter(str(adapter)), tmp_path / "out")
    from qlora.merging.base import plan_changes
    from qlora.precision import Precision

    changes = plan_changes("it", find_config(str(base)), list_tensors("it", base), read_adapter(adapter), into="16bit",
                           dtype=None, trained=Precision("bf16", "bf16", False, "a test"))
    found = checking.compare_tensors(tmp_path / "out", changes, "bf16")
    assert found.passes and 0 < found.max_difference <= 1
    tensors = tensors_of(tmp_path / "out")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        changed = {**tensors, name: tensors[name] * 1.02}
        save_file(changed, tmp_path / "out/model.safetensors")
        assert not checking.compare_tensors(tmp_path / "out", changes, "bf16").passes


# --- large models ------------------------------------------------------------------------------------------------------


def test_a_streamed_model_is_the_loaded_one(shape, tmp_path, monkeypatch):
    adapter, config = make_adapter(shape, tmp_path / "adapter"), find_config(str(shape))
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    loaded = checking.run_both(checking.load_plain(shape, config), adapter, ids)
    monkeypatch.setattr(streamed, "_SMALL", 100)
    streamed_model = checking.stream(shape, config, {}, "fp32")
    resting = sum(parameter.untyped_storage().nbytes() for parameter in streamed_model.parameters())
    assert resting < 0.1 * sum(4 * parameter.numel() for parameter in streamed_model.parameters())
    for ours, theirs in zip(checking.run_both(streamed_model, adapter, ids), loaded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(checking, "LOADED_BYTES", 0)
    found = merge(find_adapter(str(adapter)), tmp_path / "out")
    assert found.comparison.how == "streamed" and found.comparison.passes and found.comparison.kl_of_adapter > 1e-3


def test_a_streamed_layer_has_its_bias(small_model, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(find_config(str(small_model)).__class__(**{
        **find_config(str(small_model)).to_dict(), "attention_bias": True, "mlp_bias": True}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "base")
    config = find_config(str(tmp_path / "base"))
    ours, theirs = (logits(made(tmp_path / "base", config)) for made in (
        lambda folder, config: checking.stream(folder, config, {}, "fp32"), checking.load_plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_verb(ready, tmp_path, capsys, monkeypatch):
    from qlora.cli import main

    monkeypatch.chdir(tmp_path)
    digest = hashlib.sha256((ready / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert main(["merge", str(ready), "--into", "nf4", "--dtype", "fp16", "--max-shard", "200KB"]) == 0
    out = tmp_path / f"{ready.parent.name}-merged"
    shown = capsys.readouterr().out
    assert f"{out.name}" in shown and "top-1 agreement" in shown and "as NF4 had them" in shown and "allowed" in shown
    assert len(list(out.glob("*.safetensors"))) > 1 and json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert main(["merge", str(ready)]) == 2 and "not an empty folder" in capsys.readouterr().err
    assert hashlib.sha256((ready / "adapter_model.safetensors").read_bytes()).hexdigest() == digest
    with pytest.raises(SystemExit, match="2"):
        main(["merge", str(ready), "--max-shard", "3"])
    assert os.listdir(tmp_path) == [out.name]
    assert "at most (the adapter itself" in shown and "vllm serve" in shown and "AutoModelForCausalLM" in shown
    assert "a second time" in shown, "what quantising it again would be"


def test_a_dry_run_says_what_it_takes_and_writes_nothing(ready, tmp_path, capsys, monkeypatch):
    from qlora.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(ready), "--max-shard", "200KB", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    plan = qlora.merging.plan_merge(find_adapter(str(ready)), max_shard_bytes=200 * 1024)
    assert not os.listdir(tmp_path) and plan.num_shards > 1 and f"in {plan.num_shards} files" in shown
    assert "RAM:" in shown and "of 21 tensors" in shown
    found = merge(find_adapter(str(ready)), max_shard_bytes=200 * 1024)
    assert found.size_bytes == plan.size_bytes and len(list(found.folder.glob("*.safetensors"))) == plan.num_shards


def test_what_the_base_s_precision_costs_is_measured(small_model, tmp_path):
    adapter = find_adapter(str(make_adapter(small_model, tmp_path / "adapter")))
    found = merge(adapter, tmp_path / "out").comparison
    assert found.max_kl >= found.kl >= 0 and found.trained.max_kl > found.trained.kl > 100 * found.kl
    # The other side of the same: the model merged into NF4 is what was trained.
    inside = merge(adapter, tmp_path / "nf4", into="nf4", dtype="fp32")
    assert inside.comparison.trained is None and "none against training" in "".join(inside.lines())
    wanted = checking.agree(logits(load(tmp_path / "nf4")), logits(load(tmp_path / "out")))
    assert wanted.kl == pytest.approx(found.trained.kl, rel=0.8), "other prompts, the same size"
    broken = checking.agree(torch.zeros(1, 2, 3), torch.full((1, 2, 3), math.nan))
    assert broken.kl == broken.max_difference == math.inf and broken.top1 == 0
