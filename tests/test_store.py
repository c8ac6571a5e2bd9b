"""The quantised base on the disk holds the bytes of the plain build, and says so when it no longer does."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from truth import CPU, PRECISIONS, save_base

from qlora.catalog import catalog_config
from qlora.cli import main
from qlora.engine import shelf, store as store_module
from qlora.engine.arena import Binding, aligned_block, layer_layout, places_of
from qlora.engine.quantise import open_or_build, quantise_nf4, save_from_model
from qlora.engine.skeleton import build_skeleton_4bit, empty_layers, layers_path_of, materialise, rest_tensors
from qlora.engine.store import find_store, identity_of, look_up
from qlora.engine.weights import RandomWeights, SafetensorsWeights
from qlora.errors import ModelError, NeedsLoaderError, OutputError, RecipeError, StoreError
from qlora.model.build import build_base
from qlora.progress import Progress

BF16 = PRECISIONS["bf16"]
_SMALL = {"num_hidden_layers": 3, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
          "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Real configs cut down. Gemma's and GPT-2's embeddings are the head as well; Llama's, Mistral's and Phi's are not.
FAMILIES = {
    "llama": ("meta-llama/Llama-3.1-8B", {**_SMALL, "head_dim": 16}),
    "llama, tied": ("meta-llama/Llama-3.2-1B", {**_SMALL, "head_dim": 16}),
    "llama, biases, odd sizes": ("meta-llama/Llama-3.1-8B", {**_SMALL, "hidden_size": 68, "intermediate_size": 90, "head_dim": 18,
                                                             "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen/Qwen3-0.6B", {**_SMALL, "head_dim": 32}),
    "gemma2": ("google/gemma-2-2b", {**_SMALL, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": ("google/gemma-3-1b-it", {**_SMALL, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
                                        "sliding_window_pattern": 2}),
    "mistral": ("mistralai/Mistral-7B-v0.3", {**_SMALL, "head_dim": 16}),
    "phi3": ("microsoft/Phi-3.5-mini-instruct", {**_SMALL, "num_key_value_heads": 4}),
    "gpt2": ("openai-community/gpt2", {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 128, "n_ctx": 128,
                                       "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}),
}


def config_of(name):
    from transformers import AutoConfig

    id, sizes = FAMILIES[name]
    raw = {**catalog_config(id), **sizes}
    if isinstance(raw.get("rope_scaling"), dict) and "short_factor" in raw["rope_scaling"]:
        raw["rope_scaling"] = {key: value[:8] if isinstance(value, list) else value for key, value in raw["rope_scaling"].items()}
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][:3]
    return AutoConfig.for_model(**raw)


class Noting(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


class Counting:
    """Weights that count what is asked of them."""

    def __init__(self, weights):
        self.weights, self.alike, self.names = weights, weights.alike, []

    def open(self, skeleton):
        self.weights.open(skeleton)

    def tensor(self, name):
        self.names.append(name)
        return self.weights.tensor(name)

    def layers(self):
        """Numbers of the layers that were asked for, and "rest"."""
        return {next((int(part) for part in name.split(".") if part.isdigit()), "rest") for name in self.names}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small Llama in several shards, and its config."""
    from transformers import AutoModelForCausalLM

    folder, config = tmp_path_factory.mktemp("base"), config_of("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return str(folder), config


def build(folder, config, weights=None, *, progress=None, precision=BF16, seed=0):
    kind = "random" if isinstance(weights, RandomWeights) else "pretrained"
    identity = identity_of(folder, weights=kind, config=config, precision=precision, seed=seed)
    skeleton = build_skeleton_4bit(config, precision, "eager")
    return open_or_build(identity, skeleton, weights or SafetensorsWeights(folder), device_name="cpu",
                         progress=progress or Progress())


def bytes_of(store):
    return [(store.folder / name).read_bytes() for name in (shelf.LAYERS, shelf.REST)]


def block_of(store, number):
    block = aligned_block(store.layouts[number].size_bytes)
    store.read_layer(number, block)
    return block


# --- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_those_of_the_plain_build(family, weights, tmp_path):
    from transformers import AutoModelForCausalLM

    config, folder = config_of(family), str(tmp_path / "base")
    if weights == "pretrained":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.data.uniform_(0.5, 1.5)  # norms and biases that no start would give
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
        assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    real = build_base(folder, config, device=CPU, precision=BF16, weights=weights, attention="eager", seed=5)
    store = build(folder, config, RandomWeights(config, BF16, 5) if weights == "random" else None)
    path = layers_path_of(real)
    layers, names = list(real.get_submodule(path)), {name for name, _ in real.named_parameters()}
    assert store.num_layers == len(layers) == 3
    assert store.layouts[0] is store.layouts[-1] or store.layouts[0] != store.layouts[-1]
    for number, layer in enumerate(layers):
        assert layer_layout(layer) == store.layouts[number]
        found = store.layouts[number].views(block_of(store, number))
        for place in places_of(layer):
            assert torch.equal(found[place.name], place.tensor), place.name
    rest = store.rest()
    assert set(rest) == {name for name in names if not name.startswith(f"{path}.")}
    assert rest.keys() == rest_tensors(real, path).keys()
    for name, tensor in rest_tensors(real, path).items():
        assert torch.equal(rest[name], tensor), name
    assert store.num_parameters == real.num_parameters()

    copied = save_from_model({**store.identity, "base": "another"}, real, path, Progress())
    assert bytes_of(copied) == bytes_of(store)
    check_bound_skeleton(config, store, real)


def check_bound_skeleton(config, store, real):
    """The skeleton with the store's tensors answers as the model does, tables of positions and ties included."""
    skeleton = build_skeleton_4bit(config, BF16, "eager")
    assert all(parameter.is_meta == (parameter.ndim > 1) for parameter in skeleton.parameters())
    path = layers_path_of(skeleton)
    materialise(skeleton, store.rest(), "cpu")
    empty_layers(skeleton, path, "cpu")
    for number, layer in enumerate(skeleton.get_submodule(path)):
        Binding(layer, store.layouts[number]).bind(block_of(store, number))
    tokens = torch.arange(40).reshape(2, 20) * 7 % 512
    with torch.no_grad():
        assert torch.equal(skeleton(tokens).logits, real(tokens).logits)
    embeddings = skeleton.get_input_embeddings().weight
    assert (skeleton.get_output_embeddings().weight is embeddings) == bool(config.tie_word_embeddings)
    assert skeleton.training is False and skeleton.is_loaded_in_4bit and not any(p.requires_grad for p in skeleton.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1030, 2049), (2048, 1024), (3, 2**20 + 7), (5, 13)])
def test_pieces_are_quantised_as_the_whole(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    state, found = whole.quant_state, quantise_nf4(weight, "cpu")
    expected = {"": whole.data, ".absmax": state.absmax, ".code": state.code, ".offset": state.offset,
                ".nested_absmax": state.state2.absmax, ".nested_code": state.state2.code}
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_checkpoint_in_fp32(precision, tmp_path):
    """It is brought to the compute type first, and quantised in that."""
    from transformers import AutoModelForCausalLM

    config, precision = config_of("llama"), PRECISIONS[precision]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "base")
    real = build_base(folder, config, device=CPU, precision=precision, attention="eager")
    store = build(folder, config, precision=precision)
    copied = save_from_model({**store.identity, "base": "another"}, real, "model.layers", Progress())
    assert bytes_of(copied) == bytes_of(store) and store.rest()["lm_head.weight"].dtype == real.dtype


def test_layers_that_are_alike_are_quantised_once():
    config = config_of("llama")
    weights = Counting(RandomWeights(config, BF16, 0))
    store = build("me/random", config, weights)
    assert len([name for name in weights.names if name.endswith("q_proj.weight")]) == 1
    # Norms are no noise, so they count when layers are compared.
    skeleton = build_skeleton_4bit(config, BF16, "eager")
    skeleton.model.layers[2].input_layernorm.weight.data.fill_(3)
    other = open_or_build({**store.identity, "base": "other"}, skeleton, RandomWeights(config, BF16, 0), device_name="cpu",
                          progress=Progress())
    assert torch.equal(block_of(other, 1), block_of(store, 1))
    assert (other.layouts[2].views(block_of(other, 2))["input_layernorm.weight"] == 3).all()


def test_what_is_written_to_the_rest_stays_out_of_the_file(base):
    store = build(*base)
    before = bytes_of(store)
    store.rest()["model.norm.weight"].fill_(9)
    assert bytes_of(store) == before and torch.all(store.rest()["model.norm.weight"] == 9)
    store.close()
    again = find_store(store.identity)
    assert not torch.all(again.rest()["model.norm.weight"] == 9)


# --- names of checkpoints ----------------------------------------------------------------------------------------------


def resave(base, folder, change):
    """A copy of a base whose tensors went through `change`, in one file."""
    from safetensors.torch import load_file, save_file

    source = sorted(os.scandir(base), key=lambda entry: entry.name)
    tensors = {}
    for entry in source:
        if entry.name.endswith(".safetensors"):
            tensors |= load_file(entry.path)
    folder.mkdir()
    shutil.copy(f"{base}/config.json", folder)
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_parts_of_multimodal_checkpoints(base, tmp_path, prefix):
    folder = resave(base[0], tmp_path / "multimodal", lambda tensors: {
        name.replace("model.", prefix, 1) if name.startswith("model.") else f"language_model.{name}": tensor
        for name, tensor in tensors.items()} | {"vision_tower.weight": torch.zeros(3)})
    assert bytes_of(build(folder, base[1])) == bytes_of(build(*base))


def test_a_checkpoint_without_the_prefix_of_the_base_model(base, tmp_path):
    folder = resave(base[0], tmp_path / "bare", lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    assert bytes_of(build(folder, base[1])) == bytes_of(build(*base))


@pytest.mark.parametrize(("change", "error", "said"), [
    (lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up" not in n}, ModelError, "lacks 1 of the weights"),
    (lambda tensors: {n: t[:-1] if n == "model.norm.weight" else t for n, t in tensors.items()}, ModelError, "another shape"),
    (lambda tensors: {n: t.to(torch.uint8) if "up_proj" in n else t for n, t in tensors.items()}, NeedsLoaderError, "U8"),
])
def test_weights_that_are_not_the_models(base, tmp_path, change, error, said):
    folder = resave(base[0], tmp_path / "spoilt", change)
    with pytest.raises(error, match=said) as raised:
        build(folder, base[1])
    assert isinstance(raised.value, NeedsLoaderError) == (error is NeedsLoaderError)
    assert not list(shelf.bases_home().glob("*/"))


def test_ties_in_the_config_that_the_checkpoint_breaks(tmp_path):
    config = config_of("llama, tied")
    save_base(config, tmp_path / "tied")
    for name, more in (("equal", 0), ("different", 1)):
        resave(tmp_path / "tied", tmp_path / name, lambda t, more=more: {
            **t, "lm_head.weight": t["model.embed_tokens.weight"] + more})
    resave(tmp_path / "tied", tmp_path / "head-alone", lambda t: {
        "lm_head.weight" if n == "model.embed_tokens.weight" else n: x for n, x in t.items()})
    expected = bytes_of(build(str(tmp_path / "tied"), config))
    assert bytes_of(build(str(tmp_path / "equal"), config)) == expected
    assert bytes_of(build(str(tmp_path / "head-alone"), config)) == expected
    with pytest.raises(NeedsLoaderError, match="two that differ"):
        build(str(tmp_path / "different"), config)


def test_pickles_are_refused(base, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    shutil.copy(f"{base[0]}/config.json", tmp_path)
    with pytest.raises(ModelError, match="pickle"):
        build(str(tmp_path), base[1])


def test_experts_come_by_way_of_the_loader(tmp_path):
    """Experts lie one by one in the files and together in the model."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("qwen3_moe", **{**_SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                                  "moe_intermediate_size": 32})
    save_base(config, tmp_path / "base")
    with pytest.raises(NeedsLoaderError):
        build(str(tmp_path / "base"), config)
    real = build_base(str(tmp_path / "base"), config, device=CPU, precision=BF16, attention="eager")
    identity = identity_of(str(tmp_path / "base"), weights="pretrained", config=config, precision=BF16)
    store = save_from_model(identity, real, layers_path_of(real), Progress())
    found = store.layouts[1].views(block_of(store, 1))
    assert all(torch.equal(found[place.name], place.tensor) for place in places_of(real.model.layers[1]))
    check_bound_skeleton(config, build(str(tmp_path / "base"), config), real)  # the second start has it


# --- what makes a base the same ----------------------------------------------------------------------------------------


def test_everything_that_changes_the_bytes_changes_the_identity(base, monkeypatch, tmp_path):
    folder = shutil.copytree(base[0], tmp_path / "mine")
    config = config_of("llama")
    settings = dict(weights="pretrained", config=config, precision=BF16)
    first = identity_of(str(folder), **settings)
    assert first == identity_of(f"{folder}/", **settings) and json.loads(json.dumps(first)) == first
    others = [
        identity_of(str(folder), **{**settings, "precision": PRECISIONS["fp32"]}),
        identity_of(str(folder), **{**settings, "device_name": "cuda:0"}),
        identity_of(str(folder), **{**settings, "weights": "random"}),
        identity_of(str(folder), **{**settings, "weights": "random", "seed": 1}),
        identity_of(str(folder), **{**settings, "config": config_of("qwen3")}),
        identity_of(base[0], **settings),
    ]
    monkeypatch.setattr(store_module, "version", lambda name: "0.51.0")
    others.append(identity_of(str(folder), **settings))
    monkeypatch.undo()
    os.utime(next(folder.glob("*.safetensors")), ns=(1, 1))
    others.append(identity_of(str(folder), **settings))
    assert len({shelf.digest(identity) for identity in (first, *others)}) == 1 + len(others)
    assert len({shelf.folder_of(identity) for identity in (first, *others)}) == 1 + len(others)


def test_a_copy_of_another_kind_is_named(base):
    store = build(*base)
    found, reason = look_up({**store.identity, "bitsandbytes": "0.49"})
    assert found is None and reason == "the copy that is kept differs in: bitsandbytes"
    progress = Noting()
    build(*base, precision=PRECISIONS["fp32"], progress=progress)
    assert progress.lines == [f"{shelf.short_name(store.identity)} is quantised anew: the copy that is kept differs in: compute."]


def test_the_second_start_reads_no_weights(base):
    store = build(*base)
    weights = Counting(SafetensorsWeights("/nowhere"))
    again = build(*base, weights=weights)
    assert not weights.names and again.folder == store.folder


# --- damage ------------------------------------------------------------------------------------------------------------


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def rewrite(folder, **changes):
    """A manifest that is whole and says something else."""
    document = json.loads((folder / shelf.MANIFEST).read_text())
    document.pop("checksum")
    shelf.write_manifest(folder, {**document, **changes})


@pytest.mark.parametrize(("damage", "said", "redone"), [
    (lambda f: os.truncate(f / shelf.LAYERS, 5000), "layers.bin has 5,000 bytes", {0, 1, 2}),
    (lambda f: os.truncate(f / shelf.LAYERS, (f / shelf.LAYERS).stat().st_size - 1), "should have", {2}),
    (lambda f: os.truncate(f / shelf.REST, 0), "rest.bin has 0 bytes", {"rest"}),
    (lambda f: (f / shelf.REST).unlink(), "rest.bin is missing", {"rest"}),
    (lambda f: (f / shelf.LAYERS).unlink(), "layers.bin is missing", {0, 1, 2}),
    (lambda f: flip(f / shelf.MANIFEST, 200), "manifest is damaged", {0, 1, 2, "rest"}),
    (lambda f: os.truncate(f / shelf.MANIFEST, 100), "manifest is damaged", {0, 1, 2, "rest"}),
    (lambda f: (f / shelf.MANIFEST).unlink(), "manifest cannot be read", {0, 1, 2, "rest"}),
    (lambda f: rewrite(f, format=99), "format 99 of another version", {0, 1, 2, "rest"}),
    (lambda f: rewrite(f, identity={"base": "another", "source": {}}), "of another base", {0, 1, 2, "rest"}),
    (lambda f: (f / shelf.DAMAGED).write_text("the checksum of layer 1 is wrong"), "layer 1 is wrong", set()),
])
def test_what_is_damaged_is_found_and_made_anew(base, damage, said, redone):
    store = build(*base)
    expected = bytes_of(store)
    store.close()
    damage(store.folder)
    found, reason = look_up(store.identity)
    assert found is None and said in reason
    progress, weights = Noting(), Counting(SafetensorsWeights(base[0]))
    repaired = build(*base, weights=weights, progress=progress)
    assert bytes_of(repaired) == expected and weights.layers() == redone
    assert said in progress.lines[0]
    assert [path.name for path in shelf.bases_home().iterdir() if path.is_dir()] == [store.folder.name]
    assert not (repaired.folder / shelf.JOURNAL).exists() and not (repaired.folder / shelf.DAMAGED).exists()


def test_a_flipped_bit_in_a_layer_is_found_when_it_is_read(base):
    store = build(*base)
    expected = bytes_of(store)
    offset = store.layouts[0].size_bytes
    flip(store.folder / shelf.LAYERS, offset + 700)
    again = find_store(store.identity)
    block_of(again, 0)
    with pytest.raises(StoreError, match="checksum of layer 1 is wrong") as raised:
        block_of(again, 1)
    assert "repairs it" in raised.value.fix and isinstance(raised.value, OSError)
    store.close()
    again.close()
    weights = Counting(SafetensorsWeights(base[0]))
    repaired = build(*base, weights=weights)
    assert weights.layers() == {1} and bytes_of(repaired) == expected
    block_of(repaired, 1)


def test_a_flipped_bit_in_the_rest_is_found(base):
    store = build(*base)
    flip(store.folder / shelf.REST, 4)
    with pytest.raises(StoreError, match="checksum of rest.bin is wrong"):
        store.rest()
    assert find_store(store.identity) is None


def test_a_layer_is_checked_once(base, monkeypatch):
    store, seen = build(*base), []
    real = store_module.zlib.crc32
    monkeypatch.setattr(store_module.zlib, "crc32", lambda *a: seen.append(1) or real(*a))
    for _ in range(3):
        block_of(store, 0)
    assert len(seen) == 1 and store.read_layers == 3


def test_a_source_that_went_away(base, monkeypatch):
    store = build(*base)

    def unplugged(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", unplugged, raising=False)
    with pytest.raises(StoreError, match="layer 2 .* cannot be read: Input/output error") as raised:
        block_of(store, 2)
    assert "goes on from the last checkpoint" in raised.value.fix
    assert not (store.folder / shelf.DAMAGED).exists()  # it may be as good as ever when the disk is back


def test_reads_without_preadv_are_the_same(base, monkeypatch):
    store = build(*base)
    expected = [block_of(store, number) for number in range(3)]
    monkeypatch.delattr(os, "preadv", raising=False)
    assert all(torch.equal(block_of(store, number), expected[number]) for number in (2, 0, 1))


def test_layers_are_read_by_several_threads(monkeypatch):
    """With and without reads at a place, which Windows lacks."""
    from concurrent.futures import ThreadPoolExecutor

    config = config_of("llama")
    config.hidden_size, config.intermediate_size = 512, 2048
    weights = RandomWeights(config, BF16, 0)
    store = build("me/wide", config, weights)
    expected = []
    for number in range(3):  # layers are alike, so each gets a mark
        with open(store.folder / shelf.LAYERS, "r+b") as file:
            file.seek(number * store.layouts[0].size_bytes)
            file.write(bytes([number] * 8))
        store._checksums[number] = None
        store._verified.add(number)
        expected.append(block_of(store, number))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda i: block_of(store, i % 3), range(90)))
            assert all(torch.equal(block, expected[i % 3]) for i, block in enumerate(found))
            monkeypatch.delattr(os, "preadv", raising=False)
    finally:
        sys.setswitchinterval(before)


# --- the disk ----------------------------------------------------------------------------------------------------------


def test_room_is_looked_for_first(base, monkeypatch):
    from qlora.engine import writing

    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10 * 2**10))
    with pytest.raises(OutputError, match=r"needs 1\d\.\d MiB in .*bases, and 10 KiB are free there") as raised:
        build(*base)
    assert "QLORA_CACHE" in raised.value.fix and "qlora cache clear" in raised.value.fix
    assert not list(shelf.bases_home().glob("*/"))


# One fresh process for all that forks, is killed or is measured: importing the libraries takes longer than what it does.
_CHILD = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_store import *

config = config_of("llama")
config.num_hidden_layers = 12
weights, skeleton = RandomWeights(config, BF16, 0), build_skeleton_4bit(config, BF16, "eager")
weights.alike = False
identity = identity_of("me/twelve", weights="random", config=config, precision=BF16)
home, found = os.environ["QLORA_CACHE"], dict()

def make(progress=None):
    return open_or_build(identity, skeleton, weights, device_name="cpu", progress=progress or Progress())

def fork(work, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return pid

def folders():
    return [path.name for path in shelf.bases_home().iterdir() if path.is_dir()]

def use_cache(name):
    os.environ["QLORA_CACHE"] = home + "/" + name
    os.makedirs(home + "/" + name)

# -- two that build the same
def work(number):
    progress, opened = Noting(), []
    real_open, real_tensor = weights.open, weights.tensor
    weights.open = lambda skeleton: opened.append(1) or real_open(skeleton)
    weights.tensor = lambda name: time.sleep(0.005) or real_tensor(name)
    store = make(progress)
    Path(os.environ["QLORA_CACHE"] + "/said-" + str(number)).write_text(json.dumps([progress.lines, len(opened)]))

use_cache("two")
for pid in [fork(work, number) for number in range(3)]:
    os.waitpid(pid, 0)
found["two"] = [json.loads(Path(os.environ["QLORA_CACHE"] + "/said-" + str(number)).read_text()) for number in range(3)]
# Their locks went with them, although none of them let go.
found["marks"] = len(list(shelf.bases_home().glob("*/.in-use-*")))
found["removed"] = len(shelf.clear_stores().removed)

# -- no room: a limit on the size of files stands for a full disk, in the middle of a layer
def starve():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    try:
        make()
    except OutputError as error:
        Path(os.environ["QLORA_CACHE"] + "/said").write_text(str(error))

use_cache("full")
os.waitpid(fork(starve), 0)
found["full"] = [Path(os.environ["QLORA_CACHE"] + "/said").read_text(), folders()]

# -- kill -9 at random moments, until one build gets through
use_cache("undisturbed")
store = make()
expected, folder = bytes_of(store), store.folder.name
use_cache("killed")
weights.open = lambda skeleton: None  # done: what is killed is the writing
kills, seen, rng = 0, [], random.Random(7)
journal = shelf.bases_home() / (folder + ".part") / "journal.jsonl"
while find_store(identity) is None:
    pid = fork(make)
    deadline = time.monotonic() + rng.uniform(0.002, 0.03) * (1 + kills / 50)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            break
        time.sleep(0.0005)
    seen.append(len(journal.read_text().splitlines()) if journal.exists() else 0)
    assert kills < 300
found["killed"] = dict(kills=kills, seen=seen, same=bytes_of(find_store(identity)) == expected, left=folders() == [folder])

# -- a model on the Hub, which then is out of reach, with nothing of it in the client's cache
use_cache("hub")
import huggingface_hub
settings = dict(weights="pretrained", config=config_of("llama"), precision=BF16)
online = identity_of("me/llama", **settings)
on_hub = build("me/llama", config_of("llama"))
from_folder = build(os.environ["HUB_FOLDER"], config_of("llama"))
shutil.rmtree(os.environ["HF_HOME"])
huggingface_hub.constants.HF_HUB_OFFLINE = True
offline = identity_of("me/llama", **settings)
found["hub"] = dict(
    commits=[online["source"]["commit"], offline["source"]["commit"]], same=bytes_of(on_hub) == bytes_of(from_folder),
    again=str(find_store(offline).folder) == str(on_hub.folder), other=find_store(dict(offline, compute="fp32")) is None)

# -- memory: eight layers of 4.2 million numbers, and two matrices of 4.2 million around them
config = config_of("llama")
config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 512, 2048, 8, 128
config.num_key_value_heads, config.vocab_size = 4, 8192
base = home + "/base"
os.waitpid(fork(save_base, config, Path(base)), 0)
readers = dict(pretrained=SafetensorsWeights(base), random=RandomWeights(config, BF16, 0))
readers["random"].alike = False

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak(work, *arguments):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS:")
    work(*arguments)
    return status("VmHWM:") - before

if sys.platform.startswith("linux"):
    total = sum(path.stat().st_size for path in Path(base).glob("*.safetensors"))
    found["memory"] = dict(total=total, **dict((kind, peak(build, base, config, readers[kind])) for kind in readers))
    found["matrix"] = peak(quantise_nf4, torch.zeros(4096, 4096, dtype=torch.bfloat16), "cpu")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory, base):
    """What a process of its own found: see `_CHILD`. A Hub at its disposal has one model, me/llama, which is `base`."""
    home = tmp_path_factory.mktemp("caches")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, base[0]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "QLORA_CACHE": str(home), "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HUB_FOLDER": base[0],
    }
    try:
        done = subprocess.run([sys.executable, "-c", _CHILD.format(tests=os.path.dirname(__file__))], capture_output=True,
                              text=True, env={**os.environ, **settings})
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class _Hub(BaseHTTPRequestHandler):
    """Files of a folder, as the Hub hands them out."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self):
        path = os.path.join(self.folder, self.path.rpartition("/")[2])
        there = self.path.startswith("/me/llama/resolve/") and os.path.isfile(path)
        body = Path(path).read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("X-Error-Code", "" if there else "EntryNotFound")
        self.send_header("ETag", f'"{zlib.crc32(body)}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_a_model_on_the_hub(child):
    """Its commit is part of what it is; without a network, the copy that is kept does."""
    assert child["hub"] == {"commits": ["a" * 40, None], "same": True, "again": True, "other": True}


def test_a_build_that_is_killed_goes_on(child):
    """The bytes are those of a build that nobody disturbed, and what was finished stayed finished."""
    found = child["killed"]
    assert found["same"] and found["left"]
    progress = found["seen"][: found["seen"].index(max(found["seen"])) + 1]
    assert found["kills"] >= 3 and progress == sorted(progress) and len(set(progress)) >= 3, found


def test_a_disk_that_fills_up(child):
    said, left = child["full"]
    assert "There was no more room for the quantised me/twelve" in said and "File too large" in said
    assert "it needs " in said and "are free now" in said and "QLORA_CACHE" in said
    assert left == []


def test_those_that_want_the_same_make_it_once(child):
    """One builds; the others wait, say so, and read what it has made."""
    assert sorted(num_opened for _, num_opened in child["two"]) == [0, 0, 1]
    for lines, num_opened in child["two"]:
        assert lines == ([] if num_opened else ["Another run is quantising me/twelve; waiting until it has finished."])


def test_a_process_that_ended_holds_nothing(child):
    assert child["marks"] == 3 and child["removed"] == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_no_more_than_one_matrix_in_16_bits(child):
    """A piece takes 23 MiB while it is quantised, a block 3 MiB, a matrix at most 8 MiB; all of them are 80 MiB in 16 bits."""
    found = child["memory"]
    assert found["total"] > 75 * 2**20
    assert max(found["random"], found["pretrained"]) < 50 * 2**20, found
    assert child["matrix"] < 60 * 2**20  # 16.8 million numbers; 170 MiB when they are quantised at once


# --- the shelf ---------------------------------------------------------------------------------------------------------


def test_cache_lists_and_clears(base, capsys):
    config = base[1]
    assert main(["cache"]) == 0
    assert "No quantised bases are kept" in capsys.readouterr().out
    kept = build(*base)
    gone = build("me/random", config, RandomWeights(config, BF16, 0))
    gone.close()
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "me/random" in shown and "2 of them" in shown and "QLORA" not in shown
    assert main(["cache", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["num_parameters"] for entry in document["bases"]] == [kept.num_parameters] * 2
    assert all(entry["size_bytes"] >= kept.size_bytes for entry in document["bases"])
    assert document["total_bytes"] >= 2 * kept.size_bytes

    assert main(["cache", "clear", "me/random"]) == 0
    shown = capsys.readouterr().out
    assert f"Removed {gone.folder.name}" in shown.replace("\n", "") and "Freed " in shown
    assert not gone.folder.exists() and kept.folder.exists()

    block_of(kept, 0)
    assert main(["cache", "clear", "--all"]) == 0  # in use, as long as it is open
    assert "Left alone" in capsys.readouterr().out and kept.folder.exists()
    kept.close()
    assert main(["cache", "clear", "--all", "--json"]) == 0
    cleared = json.loads(capsys.readouterr().out)
    assert cleared["removed"] == [kept.folder.name] and cleared["freed_bytes"] >= kept.size_bytes
    assert not list(shelf.bases_home().glob("*/"))


@pytest.mark.parametrize(("words", "said"), [
    (["clear"], "wants the names of bases, or --all"),
    (["clear", "x", "--all"], "and not both"),
    (["clear", "nobody/knows"], "No base called 'nobody/knows' is kept"),
    (["--all"], "qlora cache clear --all"),
])
def test_mistakes_with_the_cache(words, said, base, capsys):
    build(*base).close()
    assert main(["cache", *words]) == 2
    assert said in capsys.readouterr().err and len(shelf.list_stores()) == 1


def test_unfinished_and_damaged_bases_are_listed_and_cleared(base, capsys):
    store = build(*base)
    store.close()
    (shelf.bases_home() / "half-done.part").mkdir()
    shelf.mark_damaged(store.folder, "the checksum of layer 1 is wrong")
    states = {shelved.name: shelved.state for shelved in shelf.list_stores()}
    assert states == {"half-done.part": "unfinished", store.folder.name: "the checksum of layer 1 is wrong"}
    assert main(["cache"]) == 0 and "unfinished" in capsys.readouterr().out
    assert shelf.clear_stores(["half-done.part"]).removed == ("half-done.part",)
    with pytest.raises(RecipeError, match="Kept are: "):
        shelf.clear_stores(["half-done.part"])


def test_a_cache_that_cannot_be_written(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written to") as raised:
        build(*base)
    assert "QLORA_CACHE" in raised.value.fix


def test_listing_needs_no_torch():
    code = "import sys, qlora.engine.shelf, qlora.views; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
