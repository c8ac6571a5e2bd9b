"""Counts, targets and lookups, held against published numbers, the real quantiser and PEFT's own matching."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from qlora import catalog
from qlora.architecture import (
    Projection, TargetSelection, describe, find_config, inspection, lora_parameters, nf4_bytes, select_targets,
)
from qlora.errors import ModelError

# Where fewer weights become 4-bit than lie in nn.Linear outside the head: transformers keeps the module that holds the
# last parameter of a tied Gemma 3n, and does not take subclasses of nn.Linear (Llama 4's routers).
NOT_QUANTISED = {"google/gemma-3n-E4B-it": 2048 * 2048, "meta-llama/Llama-4-Scout-17B-16E": 48 * 16 * 5120}


@pytest.fixture(scope="module")
def architectures():
    return {id: describe(find_config(id)) for id in catalog.catalog_ids()}


@pytest.fixture(scope="module")
def gpt2(architectures):
    return architectures["openai-community/gpt2"]


# --- counts -----------------------------------------------------------------------------------------------------------


def test_every_model_of_the_catalog_has_its_exact_counts(architectures):
    assert len(architectures) >= 49
    for id, architecture in architectures.items():
        facts = catalog.catalog_entry(id)
        assert architecture.num_parameters == facts.parameters, id
        assert facts.published in (None, facts.parameters), id
        assert architecture.tied_embeddings == facts.tied_embeddings, id
        if all(p.module == "Linear" for p in architecture.projections):
            assert architecture.quantised_parameters == facts.linear_parameters - NOT_QUANTISED.get(id, 0), id
        else:
            conv = sum(p.in_features * p.out_features * p.count for p in architecture.projections)
            assert (facts.linear_parameters, architecture.quantised_parameters) == (0, conv), id


def test_the_catalog_is_the_shared_facts(shared):
    rows = [line.strip("|\n ").split("|") for line in (shared / "facts/model-table.md").open()][2:]
    table = {row[0].strip(): [cell.strip().replace(",", "") for cell in row] for row in rows}
    assert set(table) == set(catalog.catalog_ids())
    for id, row in table.items():
        facts = catalog.catalog_entry(id)
        counts = (facts.parameters, facts.published or "-", facts.linear_parameters)
        assert [row[2], row[3], row[6]] == [str(count) for count in counts]
        original = shared / "facts/configs" / f"{id.replace('/', '--')}.json"
        assert catalog.catalog_config(id) == json.loads(original.read_text())


@pytest.mark.parametrize(
    ("id", "quantised", "experts"),
    [
        ("Qwen/Qwen3-30B-A3B", 905_969_664, 48 * 128 * 3 * 2048 * 768),
        ("openai/gpt-oss-20b", 637_009_920, 24 * 32 * (2880 * 5760 + 5760 + 2880 * 2880 + 2880)),
        ("google/gemma-4-26B-A4B", 1_656_258_560, 30 * 128 * 3 * 2816 * 704),
        ("Qwen/Qwen3.5-35B-A3B", 1_409_105_920, 40 * 256 * 3 * 2048 * 512),
    ],
)
def test_experts_stay_in_16_bit(architectures, id, quantised, experts):
    architecture = architectures[id]
    assert architecture.quantised_parameters == quantised
    assert architecture.unquantised_expert_parameters == experts
    selection = select_targets(architecture, "all")
    assert any(f"{experts:,}" in note and "16 bit" in note for note in selection.notes)


def test_parts_of_a_model_add_up(architectures):
    for id, architecture in architectures.items():
        shown = inspection(architecture, select_targets(architecture, "all"), r=16)
        json.dumps(shown)
        rest = shown["sixteen_bit"]
        assert shown["four_bit"]["parameters"] + rest["parameters"] == architecture.num_parameters, id
        assert rest["norms_and_rest"] >= 0, id
        assert shown["lora_parameters"] == sum(row["lora_parameters"] for row in shown["projections"]), id
        assert architecture.num_layers > 1 and architecture.max_positions, id
    llama = architectures["meta-llama/Llama-3.1-8B"]
    assert (llama.embedding_parameters, llama.head_parameters) == (128256 * 4096, 128256 * 4096)
    assert architectures["meta-llama/Llama-3.2-1B"].head_parameters == 0


@pytest.mark.parametrize("shape", [(64, 64), (33, 17), (1000, 130), (4096, 1027)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape):
    import bitsandbytes as bnb
    import torch

    weight = bnb.nn.Params4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True).to("cpu")
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == nf4_bytes(shape[0] * shape[1])


# --- targets ----------------------------------------------------------------------------------------------------------


def test_lora_parameters_of_one_projection():
    one = Projection("p", "mlp", in_features=32, out_features=64, count=1, module="Linear", paths=("p",), place="p")
    assert lora_parameters(TargetSelection((one,), ("p",), (), None), 4) == 384


def test_gpt2_c_proj_is_two_projections(gpt2):
    selection = select_targets(gpt2, ["c_attn", "c_proj"])
    assert lora_parameters(selection, 8) == 811_008
    assert "c_proj hits 12 attention and 12 mlp modules." in selection.notes
    assert [(p.place, p.in_features, p.out_features, p.module) for p in gpt2.projections] == [
        ("attn.c_attn", 768, 2304, "Conv1D"), ("attn.c_proj", 768, 768, "Conv1D"),
        ("mlp.c_fc", 768, 3072, "Conv1D"), ("mlp.c_proj", 3072, 768, "Conv1D"),
    ]
    attention = select_targets(gpt2, "attention")
    assert lora_parameters(attention, 8) == 442_368
    assert attention.patterns == ("c_attn", "attn.c_proj")
    assert round(inspection(gpt2, selection, 8)["percent_trainable"], 2) == 0.65


def test_patterns_hit_the_selected_modules_and_no_others(architectures):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for id, architecture in architectures.items():
        for targets in ("all", "attention", "qv", [architecture.projections[-1].paths[0]]):
            selection = select_targets(architecture, targets)
            config = LoraConfig(target_modules=list(selection.patterns))
            hit = {name for name in architecture.module_names if check_target_module_exists(config, name)}
            assert hit == {path for p in selection.projections for path in p.paths}, (id, targets)
            assert architecture.head_name not in hit
    llama = architectures["meta-llama/Llama-3.1-8B"]
    assert select_targets(llama, "all").patterns == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )


@pytest.mark.parametrize(
    ("id", "names"),
    [
        ("meta-llama/Llama-3.1-8B", {"q_proj", "v_proj"}),
        ("microsoft/phi-4", {"qkv_proj"}),
        ("openai-community/gpt2", {"c_attn"}),
        ("Qwen/Qwen3.5-27B", {"q_proj", "v_proj", "in_proj_qkv"}),
    ],
)
def test_query_and_value_or_what_they_are_fused_into(architectures, id, names):
    selection = select_targets(architectures[id], "qv")
    assert {p.name for p in selection.projections} == names
    assert any("keys share" in note for note in selection.notes) == (names != {"q_proj", "v_proj"})


@pytest.mark.parametrize(
    ("targets", "problem", "fix"),
    [
        (["q_prj"], "'q_prj', which hits no module", "q_proj"),
        (["lm_head"], "output head", "Leave it out"),
        (["embed_tokens"], "not a linear module", "q_proj"),
        (["all"], "inside a list", "lora.targets=all"),
        (["gate_up_proj"], "3-D tensor", "This model has"),
        ([], "empty list", "lora.targets=all"),
    ],
)
def test_targets_that_hit_nothing(architectures, targets, problem, fix):
    with pytest.raises(ModelError) as error:
        select_targets(architectures["Qwen/Qwen3-30B-A3B"], targets)
    assert problem in error.value.problem and fix in error.value.fix


def test_a_router_can_be_named_but_is_never_chosen(architectures):
    gemma = architectures["google/gemma-4-26B-A4B"]
    assert "router.proj" in {p.place for p in gemma.others}
    assert [p.place for p in select_targets(gemma, ["router.proj"]).projections] == ["router.proj"]
    assert any("router.proj" in note for note in select_targets(gemma, "all").notes)
    for architecture in architectures.values():
        places = {p.place for p in select_targets(architecture, "all").projections}
        assert not any("router" in place or "expert_gate" in place for place in places)


# --- lookup -----------------------------------------------------------------------------------------------------------


def test_catalog_names_whatever_their_case():
    assert find_config("META-llama/llama-3.1-8b").name_or_path == "meta-llama/Llama-3.1-8B"
    assert catalog.published_parameters("openai-community/GPT2") == 124_439_808
    assert catalog.nearest_ids("llama-3.1-8b-instruct")[0] == "meta-llama/Llama-3.1-8B"
    with pytest.raises(ModelError, match="Did you mean Qwen/Qwen3-8B"):
        catalog.catalog_config("qwen3-8b")


def _folder(tmp_path, config, name="config.json"):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"model_type": "llama",\n oops}', "config.json:2: not valid JSON"),
        ("[1, 2]", "holds a list"),
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": "lama"}, "does not know the model type 'lama'.*Near names: .*llama"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "not run unasked"),
        ({"model_type": "llama", "hidden_size": "large"}, "cannot read its config as 'llama'"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "bert"}, "reads text from both sides"),
        ({"model_type": "vit"}, "no causal language model class"),
    ],
)
def test_configs_that_cannot_be_used(tmp_path, config, expected):
    with pytest.raises(ModelError) as error:
        find_config(_folder(tmp_path, config))
    assert re.search(expected, str(error.value), re.DOTALL), str(error.value)


def test_folders_that_hold_no_base(tmp_path):
    with pytest.raises(ModelError, match="There is no folder"):
        find_config(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no config.json .it holds nothing"):
        find_config(str(tmp_path))
    _folder(tmp_path, {"base_model_name_or_path": "Qwen/Qwen3-8B"}, "adapter_config.json")
    with pytest.raises(ModelError, match="Its base is Qwen/Qwen3-8B"):
        find_config(str(tmp_path))
    with pytest.raises(ModelError, match="builtin:huge"):
        find_config("builtin:huge")
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        find_config(str(tmp_path / "model.gguf"))


def test_a_config_that_does_not_build_is_named(tmp_path):
    folder = _folder(tmp_path, {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0})
    with pytest.raises(ModelError, match="cannot (build the model|read its config)"):
        describe(find_config(folder))


def test_the_text_part_of_a_multimodal_model(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
    raw = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    config = find_config(_folder(tmp_path, raw))
    assert config.model_type == "gemma3_text"
    architecture = describe(config)
    assert architecture.num_layers == 2 and not architecture.tied_embeddings
    assert not any("vision" in name for name in architecture.module_names)


def test_an_encoder_can_be_inspected(tmp_path):
    raw = {"model_type": "bert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
           "num_attention_heads": 4, "vocab_size": 256}
    bert = describe(find_config(_folder(tmp_path, raw), inspect_only=True))
    assert not bert.causal
    places = {kind: [p.place for p in bert.projections if p.kind == kind] for kind in ("attention", "mlp")}
    assert places["attention"] == [
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
    ]
    assert places["mlp"] == ["intermediate.dense", "output.dense"]
    selection = select_targets(bert, "all")
    assert set(selection.patterns) == {"query", "key", "value", "output.dense", "intermediate.dense"}
    assert any("inspected" in note for note in inspection(bert, selection, 8)["notes"])


def test_lookups_need_no_torch():
    code = "import sys, qlora.architecture, qlora.guidance; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class _Hub(BaseHTTPRequestHandler):
    """Answers of a Hub to a request for config.json, by the name of the repository."""

    def do_HEAD(self):
        name = self.path.split("/")[2]
        status, code = {
            "gated": (403, "GatedRepo"), "qwen3-8b-mine": (404, "RepoNotFound"), "gguf": (404, "EntryNotFound"),
            "old": (404, "RevisionNotFound"), "broken": (400, ""),
        }.get(name, (200, ""))
        body = json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body) if status == 200 else 0))
        self.end_headers()
        if self.command == "GET" and status == 200:
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        self.server.paths.append(self.path)


_ASK = """
import json, sys
from qlora.architecture import find_config
from qlora.errors import ModelError
answers = {}
for name in sys.argv[1:]:
    base, _, revision = name.partition("@")
    try:
        answers[name] = find_config(base, revision=revision or None).num_hidden_layers
    except ModelError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


def _ask_hub(endpoint, home, *names):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", _ASK, *names], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_what_the_hub_can_answer(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        answers = _ask_hub(
            f"http://127.0.0.1:{server.server_port}", tmp_path,
            "me/gated", "me/qwen3-8b-mine", "me/gguf", "me/old@v9", "me/broken", "me/fine", "Qwen/Qwen3-8B",
        )
    finally:
        server.shutdown()
        server.server_close()
    assert "is gated" in answers["me/gated"] and "huggingface.co/me/gated" in answers["me/gated"]
    missing = answers["me/qwen3-8b-mine"]
    assert "has no model me/qwen3-8b-mine" in missing and "Qwen/Qwen3-8B" in missing
    assert "has no config.json" in answers["me/gguf"]
    assert "no revision 'v9'" in answers["me/old@v9"]
    assert "answered with an error" in answers["me/broken"]
    assert (answers["me/fine"], answers["Qwen/Qwen3-8B"]) == (3, 36)
    assert {path.rpartition("/")[2] for path in server.paths if "/resolve/" in path} == {"config.json"}
    assert not any("Qwen3-8B/" in path for path in server.paths)  # known by the catalog: never asked for


def test_without_a_network_the_near_names_are_offered():
    with pytest.raises(ModelError, match="cannot be reached.*\n.*Known without a network: meta-llama/Llama-3.1-8B"):
        find_config("me/llama-3.1-8b")
