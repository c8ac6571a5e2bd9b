"""A finished run goes to the Hub whole, once, and alone: the real program and the real client against the Hub of loopback_hub."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

BASE = {"adapter_config.json": b'{"base_model_name_or_path": "builtin:tiny"}', "adapter_model.safetensors": b"old"}
SENT = {
    ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "run/plan.json",
    "run/plots/grad_norm.png", "run/plots/learning_rate.png", "run/plots/lengths.png", "run/plots/loss.png", "run/plots/memory.png",
    "run/report.json", "run/report.md", "run/resolved.json", "tokenizer.json", "tokenizer_config.json",
}


def qlora(environment, *arguments):
    """A real process, as in a shell."""
    return subprocess.run([sys.executable, "-m", "qlora", *map(str, arguments)], capture_output=True, text=True, env=environment)


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, root):
    """A run on the embedded base that pushed itself, and the Hub as it was then."""
    from loopback_hub import LoopbackHub

    place = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        environment = hub.environment(place / "home")
        done = qlora(environment, "train", root / "recipes/quickstart.yaml", f"output={place / 'run'}", "hub=my-tiny", "hub.tag=v1",
                     "train.max_steps=2", "train.sample_rows=4", "data.max_rows=200", "memory.device=cpu")
        assert done.returncode == 0, done.stderr
        files = hub.files("tester/my-tiny")
        yield SimpleNamespace(hub=hub, run=place / "run", done=done, files=files, log=list(hub.log), environment=environment)
        assert not hub.mistakes


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to be spoiled."""
    return shutil.copytree(trained.run, tmp_path / "run")


@pytest.fixture
def push(hub, run, tmp_path):
    """Pushes the copy to a Hub of its own, which sees nothing but pushes; the run folder must stay as it is."""
    def call(*arguments, token="write"):
        before = digests(run)
        done = qlora(hub.environment(tmp_path / "home", token), "push", run, *arguments)
        assert "Traceback" not in done.stderr and digests(run) == before
        return done
    return call


# --- what arrives ------------------------------------------------------------------------------------------------------


def test_a_recipe_trains_and_pushes_in_one_command(trained):
    repo = trained.hub.repos["tester/my-tiny"]
    assert repo.private and set(trained.files) == SENT
    assert len(trained.hub.commits("tester/my-tiny")) == 2  # the one that a repository begins with, and ours
    assert trained.hub.commits("tester/my-tiny", "v1")[0].oid == trained.hub.commits("tester/my-tiny")[0].oid
    assert f"Pushed to {trained.hub.url}/tester/my-tiny" in trained.done.stdout
    assert 'PeftModel.from_pretrained(base, "tester/my-tiny")' in trained.done.stdout
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert trained.files[name] == (trained.run / "adapter" / name).read_bytes()
    config = json.loads(trained.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "builtin:tiny" and config["r"] == 16


def test_the_hub_is_asked_before_anything_else(trained):
    """Who we are, and whether the repository can be made; then nothing until the run is finished."""
    paths = [request.path for request in trained.log if "agent" not in request.path]
    assert paths[0] == "/api/whoami-v2" and "/api/repos/create" in paths[:3]
    assert not [path for path in paths if "telemetry" in path]


def test_nothing_of_the_data_and_of_this_machine_is_sent(trained, root, tmp_path):
    rows = [json.loads(line) for line in (root / "recipes/data/quickstart.jsonl").read_text().splitlines()[:200]]
    text = b"\n".join(data for path, data in trained.files.items() if path.endswith((".md", ".json", ".jinja"))
                      and not path.startswith("tokenizer")).decode()
    questions = [message["content"] for row in rows for message in row["messages"]]
    assert len(questions) > 300 and not [question for question in questions if question in text]
    assert str(trained.run.parent) not in text and str(root) not in text
    assert "left out" in trained.files["run/report.md"].decode()
    assert questions[0] not in text and "run/plots/loss.png" in trained.files["README.md"].decode()


def test_no_token_goes_anywhere_else(trained):
    """Not to the other origin, not into the run folder, not onto the terminal, not into what was sent."""
    from loopback_hub.log import leaks

    token = trained.hub.token("write")
    assert not leaks(trained.log, [token])
    assert any(request.origin == "cdn" for request in trained.log)
    assert token not in trained.done.stdout + trained.done.stderr
    assert not [path for path, data in trained.files.items() if token.encode() in data]
    assert not [path for path in trained.run.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_fresh_process_gets_the_same_logits(trained):
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from qlora.model.tiny import tiny_folder
def logits(adapter):
    base = AutoModelForCausalLM.from_pretrained(str(tiny_folder()), dtype=torch.float32)
    bare = base(torch.arange(5, 45)[None]).logits
    return bare, PeftModel.from_pretrained(base, adapter).eval()(torch.arange(5, 45)[None]).logits
with torch.no_grad():
    (bare, here), (_, there) = logits(sys.argv[1]), logits("tester/my-tiny")
print(torch.equal(here, there), not torch.equal(bare, here))
"""
    done = subprocess.run([sys.executable, "-c", script, str(trained.run / "adapter")], capture_output=True, text=True,
                          env=trained.environment)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_what_was_pushed_is_merged_from_anywhere(trained, tmp_path):
    """Base and adapter are found by the Hub id alone, on a machine that has never seen the run."""
    done = qlora({**trained.environment, "HF_HOME": str(tmp_path / "home")}, "merge", "tester/my-tiny", tmp_path / "merged")
    assert done.returncode == 0 and "Checked: loaded by Transformers" in done.stdout, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_second_push_makes_no_commit(trained):
    before = digests(trained.run)
    done = qlora(trained.environment, "push", trained.run)
    assert done.returncode == 0 and "Everything is there already" in done.stdout
    assert len(trained.hub.commits("tester/my-tiny")) == 2 and digests(trained.run) == before


# --- a look before ------------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_all_and_sends_nothing(hub, push):
    done = push("me/it", "--dry-run", "--tag", "v3", token=None)
    assert done.returncode == 0, done.stderr
    assert all(path in done.stdout for path in SENT - {".gitattributes"}) and "485 KiB" in done.stdout
    assert "library_name: peft" in done.stdout and "v3" in done.stdout and "private" in done.stdout
    assert not hub.requests("repos|preupload|commit|lfs")


@pytest.mark.parametrize(
    ("token", "repo", "expected"),
    [
        (None, "it", "There is no token"), ("nobody", "it", "401"), ("read", "it", "may only read"),
        ("fine-read", "it", "fine-grained"), ("fine-one", "it", "fine-grained"), ("write", "stranger/it", "belongs to stranger"),
        ("write", "quiet-lab/it", "may only read in the organisation quiet-lab"), ("write", "no--name", "cannot be the name"),
    ],
)
def test_what_cannot_succeed_is_refused(hub, push, token, repo, expected):
    done = push(repo, token=token)
    assert done.returncode == 2 and expected in done.stderr and not hub.repos


def test_a_run_whose_push_cannot_succeed_does_not_begin(hub, tmp_path, root):
    words = ["train", root / "recipes/quickstart.yaml", f"output={tmp_path / 'run'}", "hub=it"]
    done = qlora(hub.environment(tmp_path / "home", "read"), *words)
    assert done.returncode == 2 and "may only read" in done.stderr and "hub.required=false" in done.stderr
    assert "Reading" not in done.stderr and not (tmp_path / "run").exists() and not hub.repos


def test_a_push_that_is_not_required_lets_the_run_go_on(hub, tmp_path, small_model, rows_file):
    """The base is on the Hub as well: the adapter names it, and the commit that it was trained on."""
    hub.add_repo("acme/base", {path.name: path.read_bytes() for path in small_model.iterdir()})
    hub.add_commit("acme/base", {"README.md": b"---\nlicense: mit\n---\n"})
    commit = hub.commits("acme/base")[0].oid
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: acme/base\ndata: {rows_file}\nmemory: {{device: cpu}}\noutput: {tmp_path / 'out'}\n"
                      "train: {max_steps: 1, batch: 8, sample_rows: 0}\nhub: {repo: it, required: false}\n")
    done = qlora(hub.environment(tmp_path / "home", "read"), "train", recipe)
    assert done.returncode == 3 and "The push will probably fail" in done.stderr, done.stderr
    assert f"qlora push {tmp_path / 'out'} it" in done.stderr and (tmp_path / "out" / "adapter").is_dir()
    hub.add_commit("acme/base", {"config.json": b"{}"})  # its owner goes on
    assert qlora(hub.environment(tmp_path / "home"), "push", tmp_path / "out").returncode == 0
    for config in (hub.files("tester/it")["adapter_config.json"], (tmp_path / "out/adapter/adapter_config.json").read_bytes()):
        assert (json.loads(config)["base_model_name_or_path"], json.loads(config)["revision"]) == ("acme/base", commit)
    card = hub.files("tester/it")["README.md"].decode()
    assert "base_model: acme/base" in card and "license: mit" in card and commit in card


def test_a_base_that_is_a_folder_is_named_without_its_place(small_model):
    from qlora.hub.parcel import public_name

    assert public_name(str(small_model)) == small_model.name and public_name("acme/base") == "acme/base"


@pytest.mark.parametrize("token", ["fine", "fine-org"])
def test_a_fine_grained_token_is_enough_where_it_may_write(hub, push, token):
    repo = "tester/it" if token == "fine" else "acme/it"
    assert push(repo, token=token).returncode == 0 and hub.repos[repo].private


# --- what is there already ------------------------------------------------------------------------------------------------


def test_a_card_that_people_have_edited_stays(hub, push):
    assert push("it").returncode == 0
    edited = hub.files("tester/it")["README.md"] + b"\nSpoken of at length by its maker.\n"
    hub.add_commit("tester/it", {"README.md": edited, "notes.txt": b"mine"})
    done = push("it")
    assert done.returncode == 0 and "MODEL_CARD.md" in done.stdout
    files = hub.files("tester/it")
    assert files["README.md"] == edited and files["notes.txt"] == b"mine" and b"written by qlora" in files["MODEL_CARD.md"]
    num_commits = len(hub.commits("tester/it"))
    assert push("it").returncode == 0 and len(hub.commits("tester/it")) == num_commits


def test_a_card_edited_before_the_push_is_sent(hub, run, push):
    card = run / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    assert "By hand." in push("it", "--dry-run").stdout
    assert push("it").returncode == 0 and hub.files("tester/it")["README.md"] == card.read_bytes()


def test_files_of_an_older_push_go_and_others_stay(hub, push):
    """A chat template that is left behind would be loaded with the new adapter."""
    hub.add_repo("tester/it", {**BASE, "chat_template.json": b"{}", "adapter_model.bin": b"x", "run/plots/old.png": b"\0", "LICENSE": b"mine"},
                 private=True)
    assert push("it").returncode == 0
    files = set(hub.files("tester/it"))
    assert not files & {"chat_template.json", "adapter_model.bin", "run/plots/old.png"} and "LICENSE" in files
    assert len(hub.commits("tester/it")) == 3


@pytest.mark.parametrize(
    ("files", "private", "arguments", "expected"),
    [
        ({"model.safetensors": b"x", "config.json": b"{}"}, True, [], "something else than an adapter: config.json, model.safetensors"),
        ({**BASE, "adapter_config.json": b'{"base_model_name_or_path": "Qwen/Qwen3-8B"}'}, True, [], "adapter for Qwen/Qwen3-8B"),
        (BASE, False, [], "is public, and this push is to be private"),
    ],
)
def test_a_repository_with_something_else_is_refused(hub, push, files, private, arguments, expected):
    hub.add_repo("tester/it", files, private=private)
    done = push("it", *arguments)
    assert done.returncode == 2 and expected in done.stderr
    assert {path: hub.files("tester/it")[path] for path in files} == files


@pytest.mark.parametrize("words", [["--tag", "my tag"], ["--tag", "a..b"], ["--revision", "x/"], ["--tag", "deadbeef"], ["--revision", "x.lock"]])
def test_names_that_git_does_not_take_are_refused_before_anything_else(hub, push, words):
    done = push("it", *words)
    assert done.returncode == 2 and "cannot be the name of a" in done.stderr and not hub.requests("repos|models")


def test_public_only_where_it_is_said(hub, push):
    assert push("it", "--public").returncode == 0 and not hub.repos["tester/it"].private


def test_branches_and_tags(hub, run, push):
    assert push("it", "--tag", "v1").returncode == 0
    first = hub.commits("tester/it")[0].oid
    assert push("it", "--tag", "v1").returncode == 0  # the same content, as after a push that was broken off before its end
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    done = push("it", "--tag", "v1")
    assert done.returncode == 2 and "tags are not moved" in done.stderr and hub.commits("tester/it")[0].oid == first
    done = push("it", "--tag", "v2", "--revision", "next")
    assert done.returncode == 0 and "/tree/next" in done.stdout
    assert hub.commits("tester/it")[0].oid == first == hub.commits("tester/it", "v1")[0].oid
    assert hub.files("tester/it", "v2")["chat_template.jinja"] == b"{{ messages }}"


# --- what is not sent -----------------------------------------------------------------------------------------------------


def test_only_what_belongs_to_an_adapter_is_sent(hub, run, push):
    for name in ("optimizer.pt", "training_args.bin", "rows.jsonl", ".env"):
        (run / "adapter" / name).write_bytes(b"private")
    done = push("it", "--dry-run")
    assert "Not sent: .env, optimizer.pt, rows.jsonl, training_args.bin" in done.stdout
    assert push("it").returncode == 0 and set(hub.files("tester/it")) == SENT


def test_a_secret_in_a_file_stops_the_push(hub, run, push):
    (run / "README.md").write_text(f"My token is\n\n{hub.token('fine')}\n")
    done = push("it")
    assert done.returncode == 2 and "README.md, line 3" in done.stderr and hub.token("fine") not in done.stderr
    assert not hub.requests("repos|preupload|commit")


def test_samples_go_only_where_they_are_asked_for(hub, run, push):
    prompt = json.loads((run / "report.json").read_text())["samples"][0]["prompt"]
    assert push("it").returncode == 0 and prompt.encode() not in b"".join(hub.files("tester/it").values())
    assert push("it", "--samples").returncode == 0 and prompt in json.loads(hub.files("tester/it")["run/report.json"])["samples"][0]["prompt"]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), "is not finished"),
        (lambda run: (run / "report.json").unlink(), "is not finished"),
        (lambda run: (run / "report.json").write_text("{"), "cannot be read as a report"),
        (lambda run: (run / "adapter" / "tokenizer.json").rename(run / "t") and (run / "adapter" / "tokenizer.json").symlink_to(run / "t"),
         "holds links"),
        (lambda run: (run / "adapter" / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda run: (run / "adapter" / "adapter_config.json").write_text("[]"), "holds no mapping"),
    ],
)
def test_what_is_no_finished_run_is_refused(hub, run, push, spoil, expected):
    spoil(run)
    done = push("it")
    assert done.returncode == 2 and re.sub(r"\s+", " ", done.stderr).count(expected) == 1, done.stderr
    assert not hub.requests("repos|preupload|commit")
