"""GGUF files: read back by Transformers' own loader, held against the merged model, and never half done."""

import contextlib
import json
import shutil

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file

from qlora.catalog.lookup import find_config
from qlora.errors import BusyError, ModelError, OutputError, RecipeError, VerificationError
from qlora.exporting import ADAPTER_FORMATS, FORMATS, export, find_format, plan_export
from qlora.exporting.checking import stream_file
from qlora.exporting.ollama import find_pieces, modelfile
from qlora.exporting.reading import Encoder, GgufFile
from qlora.exporting.texts import _PROMPTS, _TEXTS, in_form
from qlora.exporting.vocabulary import SPLITS, read_vocabulary
from qlora.hub.fetch import find_adapter
from qlora.merging import merge
from qlora.progress import Progress

IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Makes base and adapter of a family once; returns the adapter."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def make(name):
        if name not in made:
            base = tiny_families.save_family(name, root / name / "base")
            made[name] = find_adapter(str(tiny_families.save_adapter(base, root / name / "adapter")))
        return made[name]

    return make


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def copied(adapter, folder, **settings):
    """The adapter in another folder, with other settings."""
    shutil.copytree(adapter.folder, folder)
    edit(folder / "adapter_config.json", **settings)
    return folder


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def merged_by_peft(adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(adapter.base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter.folder).merge_and_unload().eval()


def merged_model(adapter, folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(merge(adapter, folder).folder, dtype=torch.float32).eval()


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_every_family_is_what_transformers_reads(family, tmp_path, name):
    adapter = family(name)
    found = export(adapter, tmp_path / "out", form="f32")
    model, texts = found.model, found.texts
    assert model.how == "Transformers" and model.exported.max_difference < 1e-3 and model.exported.top1 == 1
    assert model.whole.kl < 1e-6 and model.kl_of_adapter > 0.01, "the adapter is in it"
    assert model.trained.kl > 10 * model.whole.kl, "the base in 4 bits is another one"
    assert texts.num_same == texts.num_texts and texts.example is None
    assert model.from_header == (name in ("mistral", "qwen2", "phi3"))
    # Module by module from the disk, as large models are run, it is the same.
    parts = found.plan.parts
    from qlora.exporting import families

    placed = families.place("it", parts.config, found.plan.family, parts.changes)
    wanted = logits(merged_by_peft(adapter))
    streamed = logits(stream_file(found.path, parts.config, placed))
    torch.testing.assert_close(streamed, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert ("output.weight" in GgufFile(found.path).names) != parts.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.long), "phi4-mini"])
def test_an_adapter_alone_is_the_product(family, tmp_path, name):
    adapter = family(name)
    found = export(adapter, tmp_path / "out", adapter_only=True)
    file = GgufFile(found.path)
    assert found.adapter.passes and found.adapter.share > 0 and found.adapter.agreement.kl < 1e-5 < found.adapter.kl_of_adapter
    assert {file.type_of(each) for each in file.names} == {"F16"}
    assert file.values["general.type"] == "adapter" and file.values["adapter.type"] == "lora"
    model = GgufFile(export(adapter, tmp_path / "model", form="f32").path)
    assert {each.rpartition(".lora_")[0] for each in file.names} < set(model.names), "names are the base's"
    assert file.values["general.architecture"] == model.values["general.architecture"]


def test_ranks_alphas_and_roots_go_into_one_alpha(family, tmp_path):
    adapter = family("llama")
    folder = tiny_families.save_adapter(adapter.folder.parent / "base", tmp_path / "adapter", use_rslora=True,
                                        rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})
    found = export(find_adapter(str(folder)), tmp_path / "out", form="f32", adapter_only=True)
    assert found.adapter.share < 1e-5
    file, delta = GgufFile(found.path), found.plan.parts.files.products["model.layers.0.self_attn.q_proj"].delta(
        transposed=False, rows=slice(None))
    a, b = file.tensor("blk.0.attn_q.weight.lora_a"), file.tensor("blk.0.attn_q.weight.lora_b")
    ours = (b @ a) * file.values["adapter.lora.alpha"] / b.shape[1]
    # llama.cpp's order of rows (conversion/llama.py: permute): 4 heads of 16
    torch.testing.assert_close(ours, delta.reshape(4, 2, 8, -1).swapaxes(1, 2).reshape(delta.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["bf16", "q8_0", "q4_0", *(pytest.param(form, marks=pytest.mark.long) for form in FORMATS
                                                             if form not in ("bf16", "q8_0", "q4_0"))])
def test_a_format_stores_what_it_says(family, tmp_path, form):
    found = export(family("llama"), tmp_path / "out", form=form)
    file, wanted = GgufFile(found.path), FORMATS[form]
    assert file.type_of("blk.0.ffn_up.weight") == wanted.matrices and file.type_of("token_embd.weight") == wanted.embeddings
    assert file.type_of("blk.0.attn_norm.weight") == file.type_of("blk.0.attn_q.bias") == "F32"
    assert file.values["general.file_type"] == wanted.file_type and found.path.name == f"out-{form.upper()}.gguf"
    assert found.model.exported.kl <= found.model.limit == wanted.max_kl
    assert (found.model.exported.kl == 0) == (form == "f32"), "the base is in fp32"
    assert found.plan.size_bytes <= found.size_bytes < found.plan.size_bytes + 40_000


@pytest.mark.parametrize("base", ["stories260K", "builtin:tiny"])
def test_f16_of_a_real_model_writes_the_same_text(request, tmp_path, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.model.build import locate_base

    place = request.getfixturevalue("shared") / "models" / base if base == "stories260K" else locate_base(base)
    adapter = find_adapter(str(tiny_families.save_adapter(place, tmp_path / "adapter")))
    found = export(adapter, tmp_path / "out", form="f16")
    assert found.model.how == "Transformers" and found.model.from_header and found.model.exported.kl < 1e-2
    assert found.texts.prompts_same and found.texts.num_same == found.texts.num_texts
    assert found.texts.by_transformers >= found.texts.num_texts - 1, "its reader cuts leading spaces in a way of its own"
    tokenizer = AutoTokenizer.from_pretrained(found.folder, gguf_file=found.plan.file)
    exported = AutoModelForCausalLM.from_pretrained(found.folder, gguf_file=found.plan.file, dtype=torch.float32).eval()
    merged = merged_model(adapter, tmp_path / "merged")
    texts = (*_PROMPTS, *_TEXTS, "Once upon a time", "Tom and Sue", "The sun", "One day", "Hello")
    prompts = [in_form(tokenizer, text) for text in texts]
    assert len(prompts) == 20
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        one, other = (model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (exported, merged))
        assert torch.equal(one, other), prompt
        assert tokenizer.decode(one[0]) == tokenizer.decode(other[0])


def test_a_head_that_is_the_embedding_is_there_once(family, tmp_path):
    adapter = family("llama3")
    base = tmp_path / "base"
    shutil.copytree(adapter.base, base)
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as some checkpoints have it
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    plan = plan_export(find_adapter(str(adapter.folder), base=str(base)), tmp_path / "out")
    assert "output.weight" not in [entry.name for entry in plan.entries] and not plan.notes


def test_into_nf4_is_what_was_trained(family, tmp_path):
    adapter = family("qwen2")
    found = export(adapter, tmp_path / "out", form="f32", into="nf4")
    assert found.model.trained is None and found.model.whole.kl < 1e-6
    assert found.model.kl_of_adapter > 0.01 and "none" not in found.lines()[1]


# --- what the header says ----------------------------------------------------------------------------------------------


def described(config, name):
    from qlora.exporting import families, metadata

    family = families.find_family("it", config)
    return metadata.describe("it", config, family, vocab_size=config.vocab_size, file_type=0, name=name)


def test_windows_positions_and_what_llama_cpp_has_not(tmp_path):
    def config_of(name, **settings):
        config = tiny_families.family_config(name, 320)
        for key, value in settings.items():
            setattr(config, key, value)
        return config

    def values(found):
        return {field.key: field.value for field in found.fields}

    found = described(config_of("mistral", sliding_window=64), "it")
    assert values(found)["llama.context_length"] == 64 and "last 64 tokens" in found.notes[0]
    assert not described(config_of("mistral"), "it").notes
    assert values(described(config_of("gemma3"), "it"))["gemma3.attention.sliding_window_pattern"] == [True, False]
    six = config_of("gemma3", num_hidden_layers=12, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2)
    assert "gemma3.attention.sliding_window_pattern" not in values(described(six, "it"))
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    divisors = described(config_of("llama3"), "it").extra["rope_freqs.weight"]
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(divisors), LlamaRotaryEmbedding(config_of("llama3")).inv_freq)
    assert divisors[0] == 1 < divisors[1] < divisors[2] < 8 == divisors[-1], "below, between and above"
    phi = values(described(config_of("phi4-mini"), "it"))
    assert phi["phi3.rope.dimension_count"] == 12 and phi["phi3.rope.scaling.attn_factor"] == pytest.approx(1.0541, abs=1e-4)
    for name, settings, said in (
        ("llama", {"hidden_act": "gelu"}, "activation gelu"), ("gemma2", {"query_pre_attn_scalar": 8}, "scalar 8"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    ):
        with pytest.raises(ModelError, match=said):
            described(config_of(name, **settings), "it")
    with pytest.raises(ModelError, match="by dynamic"):
        described(config_of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "it")


# --- the tokenizer -----------------------------------------------------------------------------------------------------


def encoder_of(vocabulary):
    return Encoder({field.key: field.value for field in vocabulary.fields})


@pytest.mark.parametrize("pre", [*SPLITS, "gpt-2", "smollm"])
def test_the_way_of_cutting_is_found_by_its_expression(pre):
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny_families.make_tokenizer("llama3" if pre in ("llama-bpe", "tekken") else "llama")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    first = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")] if pre in SPLITS else []
    first = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else first
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    found = read_vocabulary(tokenizer, 360, ())
    assert found.pre == pre and not found.notes
    encoder = encoder_of(found)
    for text in (*_TEXTS, "<|turn|>user\nit's<think> 12</s>"):
        assert encoder.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_an_unknown_way_of_cutting_is_said(family):
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny_families.make_tokenizer("llama")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[aeiou]+|[^aeiou]+"), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    found = read_vocabulary(tokenizer, 360, ())
    assert found.pre == "default" and "no name" in found.notes[0]


@pytest.mark.parametrize("name", ["phi3", "gemma2"])
def test_sentencepiece_tokens_are_joined_in_the_order_of_the_merges(name):
    tokenizer = tiny_families.make_tokenizer(name)
    found = read_vocabulary(tokenizer, len(tokenizer) + 3, (5,))
    values = {field.key: field.value for field in found.fields}
    assert found.model == "llama" and found.kinds[4:260] == (6,) * 256 and found.kinds[1] == 3
    assert found.tokens[-1].startswith("[PAD") and found.kinds[-1] == 5
    assert values["tokenizer.ggml.add_space_prefix"] == (name == "phi3") and values["tokenizer.ggml.eot_token_id"] == 5
    assert found.kinds[tokenizer.convert_tokens_to_ids("<think>")] == 4
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    joined = [found.scores[tokenizer.convert_tokens_to_ids("".join(pair))] for pair in merges]
    assert joined == sorted(joined, reverse=True) and len(set(joined)) > 20
    encoder = encoder_of(found)
    for text in (*_TEXTS, "the cat sat on the mat", "<|turn|>the cat</s>the dog"):
        assert encoder.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_tokens_beyond_the_embedding_and_other_kinds_of_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_families.make_tokenizer("llama")
    found = read_vocabulary(tokenizer, len(tokenizer) - 1, ())
    assert "left out, first <think>" in found.notes[0] and len(found.tokens) == len(tokenizer) - 1
    with pytest.raises(ModelError, match="no row in the model's embedding"):
        read_vocabulary(tokenizer, 2, ())
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0)))
    with pytest.raises(ModelError, match="Unigram"):
        read_vocabulary(unigram, 2, ())


# --- the Modelfile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "can"), [
    ("{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
     "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}", True),
    ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
     "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
     "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}", True),
    ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", False),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", False),
    (None, False),
])
def test_a_template_is_said_in_ollama_s_language_or_not_at_all(template, can):
    tokenizer = tiny_families.make_tokenizer("llama")
    tokenizer.chat_template = template
    pieces = find_pieces(tokenizer)
    assert (pieces is not None) == can
    text, has_template = modelfile("it.gguf", tokenizer, ("</s>",), adds_bos=True)
    assert text.startswith("FROM ./it.gguf\n") and text.endswith('PARAMETER stop "</s>"\n') and has_template == can
    if can:
        chat = [["user", "a"], ["assistant", "b"], ["user", "c"], ["assistant", "d"], ["user", "e"]]
        wanted = tokenizer.apply_chat_template([{"role": role, "content": said} for role, said in chat], tokenize=False,
                                               add_generation_prompt=True)
        assert pieces.render(chat) == wanted and pieces.start == "<s>"
        assert 'TEMPLATE """{{ range .Messages }}' in text, "llama.cpp adds the token that begins a text"


# --- whole or not at all -----------------------------------------------------------------------------------------------


class Damage(Progress):
    """Changes the written file before it is looked at."""

    def __init__(self, part, change, stage="Reading it back"):
        self.part, self.change, self.stage_name = part, change, stage

    @contextlib.contextmanager
    def stage(self, text, **options):
        if text.startswith(self.stage_name):
            self.change(next(self.part.glob("*.gguf")))
        yield lambda done, total: None


def swap_bytes(name):
    """A change that turns the rows of a tensor around."""
    def change(path):
        found = GgufFile(path).rows(name)
        with path.open("r+b") as file:
            file.seek(found._start)
            block = file.read(found._row_bytes * len(found))
            rows = [block[at : at + found._row_bytes] for at in range(0, len(block), found._row_bytes)]
            file.seek(found._start)
            file.write(b"".join(reversed(rows)))

    return change


_READING, _COMPARING = "Reading it back", "Comparing it with base"


@pytest.mark.parametrize(("form", "alone", "tensor", "stage", "said"), [
    ("q8_0", False, "blk.1.attn_q.weight", _READING, "blk.1.attn_q.weight, read back"),
    ("q8_0", False, "blk.1.attn_q.weight", _COMPARING, "merged and exported differ"),
    ("q4_0", False, "blk.0.ffn_down.weight", _READING, "blk.0.ffn_down.weight, read back"),
    ("f16", True, "blk.1.attn_q.weight.lora_b", _COMPARING, "the product of model.layers.1.self_attn.q_proj"),
])
def test_a_file_that_differs_fails_and_is_kept_aside(family, tmp_path, form, alone, tensor, stage, said):
    with pytest.raises(VerificationError, match=rf"(?s){said}.*is kept in .*out\.differs"):
        export(family("llama"), tmp_path / "out", form=form, adapter_only=alone,
               progress=Damage(tmp_path / "out.part", swap_bytes(tensor), stage))
    assert [path.name for path in tmp_path.iterdir()] == ["out.differs"] and list(tmp_path.glob("out.differs/*.gguf"))


def test_a_tokenizer_that_differs_fails(family, tmp_path):
    def change(path):  # two letters change places in the list of tokens, each a length of 8 bytes and one character
        content = path.read_bytes()
        first = content.index(b"tokenizer.ggml.tokens")
        one, other = (content.index((1).to_bytes(8, "little") + letter, first) for letter in (b"W", b"N"))
        swapped = bytearray(content)
        swapped[one + 8], swapped[other + 8] = content[other + 8], content[one + 8]
        path.write_bytes(swapped)

    with pytest.raises(VerificationError, match="cuts a plain prompt otherwise"):
        export(family("llama"), tmp_path / "out", form="f32", progress=Damage(tmp_path / "out.part", change))


def test_what_cannot_be_done_is_said_before_anything_is_written(family, tmp_path, monkeypatch):
    import qlora.hardware.host

    adapter = family("llama")
    for name, said in (("q4_k_m", "llama-quantize"), ("Q9", "Take one of f32")):
        with pytest.raises(RecipeError, match=said):
            find_format(name)
    with pytest.raises(RecipeError, match=", ".join(ADAPTER_FORMATS)):
        export(adapter, tmp_path / "out", form="q8_0", adapter_only=True)
    with pytest.raises(ModelError, match="Name that one: --base MODEL"):
        export(find_adapter(str(adapter.folder), base=family("qwen3").base), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        export(adapter, tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(qlora.hardware.host, "host_memory", lambda: (2**30, 2**18))
        with pytest.raises(OutputError, match=r"Exporting takes .* MiB of RAM; 256 KiB are free"):
            export(adapter, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        with pytest.raises(OutputError, match=r"The GGUF file takes .* MiB; 1\.0 MiB are free"):
            export(adapter, tmp_path / "out")
    from filelock import FileLock

    (tmp_path / "out.part").mkdir()
    with FileLock(tmp_path / "out.part/.qlora-part"), pytest.raises(BusyError):
        export(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "out.part"}


def test_an_unknown_family_and_what_an_adapter_file_cannot_hold(family, small_model, tmp_path):
    import transformers

    config = transformers.OlmoConfig(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                     num_attention_heads=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    adapter = tiny_families.save_adapter(tmp_path / "olmo", tmp_path / "a")
    with pytest.raises(ModelError, match=r"family olmo, .*these are: llama, mistral"):
        plan_export(find_adapter(str(adapter)), tmp_path / "out")
    whole = tiny_families.save_adapter(family("llama").folder.parent / "base", tmp_path / "b", target_modules=["q_proj"],
                                       modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"holds lm_head\.weight whole"):
        plan_export(find_adapter(str(whole)), tmp_path / "out", adapter_only=True)
    found = export(find_adapter(str(whole)), tmp_path / "out", form="f32")
    assert found.model.whole.kl < 1e-6, "merged, it has its place"


def test_numbers_that_a_type_cannot_hold_stop_it(family, tmp_path):
    folder = copied(family("llama"), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * (1e8 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="--gguf bf16"):
        export(find_adapter(str(folder)), tmp_path / "out", form="f16")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}, "nothing is left"


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_verb(family, tmp_path, capsys, monkeypatch):
    from qlora.cli import main

    adapter = family("qwen2")
    source = str(adapter.folder)
    monkeypatch.chdir(tmp_path)
    assert main(["export", source, "--gguf", "f16", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "RAM:" in shown and "Disk:" in shown and "qwen2-F16.gguf" in shown and not list(tmp_path.iterdir())
    assert main(["export", source, "--gguf"]) == 0
    shown = capsys.readouterr().out
    for said in ("merged and exported", "allowed", "top-1 agreement", "at most", "Cost:", "ollama create", "llama-cli -m",
                 "vllm serve", "gguf_file='qwen2-Q8_0.gguf'"):
        assert said in shown, said
    assert {path.name for path in (tmp_path / "qwen2-gguf").iterdir()} == {"qwen2-Q8_0.gguf", "Modelfile"}
    assert main(["export", source]) == 2 and "not an empty folder" in capsys.readouterr().err
    assert main(["export", source, "--gguf", "q5_k_m"]) == 2 and "llama-quantize" in capsys.readouterr().err
    assert main(["export", "nowhere"]) == 2 and "no folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/resolved.json").write_text("{}")
    assert main(["export", "run"]) == 2 and "not finished" in capsys.readouterr().err
    assert main(["export", source, "alone", "--adapter-only"]) == 0
    assert "--lora alone/alone-adapter-F16.gguf" in capsys.readouterr().out
    assert "ADAPTER ./alone-adapter-F16.gguf" in (tmp_path / "alone/Modelfile").read_text()
    assert find_config(adapter.base).model_type == "qwen2"
