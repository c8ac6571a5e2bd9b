"""The loopback Hub: what the real client does with it, and its rules."""

import hashlib
import http.client
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub.clients import ask, commit_lines, run_client, small

CARD = b"---\nlicense: mit\nlibrary_name: peft\ntags: [lora]\n---\n# A card\n"
LARGE = bytes(range(256)) * 12_000  # 3 MB
FILES = {"README.md": CARD, "adapter_config.json": b"{}", "run/plots/loss.png": b"\x89PNG\0picture",
         "adapter_model.safetensors": LARGE}


def folder_of(files, folder):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


ROUND_TRIP = """
api.create_repo("tester/one", private=True)
first = api.upload_folder(repo_id="tester/one", folder_path=sys.argv[1])
again = api.upload_folder(repo_id="tester/one", folder_path=sys.argv[1])
folder = Path(snapshot_download("tester/one"))
checked = api.verify_repo_checksums("tester/one")
found.update(same=first.oid == again.oid, folder=str(folder), bad=len(checked.mismatches), checked=checked.checked_count)
info = api.model_info("tester/one", files_metadata=True)
found.update(private=info.private, licence=info.card_data.license,
             large={file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs})
found["blobs"] = {file.rfilename: file.blob_id for file in info.siblings}
found["infos"] = sorted(info.path for info in api.get_paths_info("tester/one", ["run", "README.md", "nowhere"]))
found["top"] = sorted(entry.path for entry in api.list_repo_tree("tester/one"))
found["commits"] = [commit.title for commit in api.list_repo_commits("tester/one")]
api.update_repo_settings("tester/one", private=False)
api.delete_file("adapter_config.json", "tester/one")
api.delete_folder("run", "tester/one")
"""


def test_round_trip_of_a_folder(hub, tmp_path):
    found = run_client(hub, tmp_path / "home", ROUND_TRIP, folder_of(FILES, tmp_path / "folder"))
    snapshot = hub.commits("tester/one")[2].files
    for path, data in FILES.items():
        assert (Path(found["folder"]) / path).read_bytes() == snapshot[path].data == data
    assert found["same"] and found["bad"] == 0 and found["checked"] == len(FILES) + 1
    assert found["private"] is True and found["licence"] == "mit"
    assert found["large"] == {path: hashlib.sha256(FILES[path]).hexdigest() for path in ("run/plots/loss.png",
                                                                                         "adapter_model.safetensors")}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(LARGE).hexdigest()}\nsize {len(LARGE)}\n"
    for path, blob in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", pointer.encode())):
        assert found["blobs"][path] == hashlib.sha1(b"blob %d\0%s" % (len(blob), blob)).hexdigest()
    assert found["infos"] == ["README.md", "run"]
    assert found["top"] == [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "run"]
    assert len(found["commits"]) == 2 and found["commits"][1] == "initial commit"
    assert not hub.repos["tester/one"].private
    assert sorted(hub.files("tester/one")) == [".gitattributes", "README.md", "adapter_model.safetensors"]


def test_no_token_reaches_the_storage_origin(hub, tmp_path):
    hub.part_bytes = 1 << 20
    run_client(hub, tmp_path / "home", ROUND_TRIP, folder_of(FILES, tmp_path / "folder"))
    assert hub.url.split(":")[1] != hub.storage_url.split(":")[1]  # two names: to some clients another port is the same origin
    stored = hub.requests(origin="cdn")
    assert {request.method for request in stored} == {"PUT", "GET"}
    assert not any(request.authorised for request in stored) and hub.leaks() == []
    assert all(request.user == "tester" for request in hub.requests("/commit/|whoami|/resolve/"))
    for account in hub.accounts.values():
        assert re.fullmatch("hf_[A-Za-z]{34}", account.token)
        assert account.token not in hub.transcript() + repr(hub.log)
    # The check itself: tokens in other places are found.
    address = hub.signed(f"/lfs/{hub.repos['tester/one'].number}/{'0' * 64}")
    assert ask(hub, "GET", address, token="write")[0] == 400
    ask(hub, "GET", "/api/models/tester/one?token=" + hub.token("read"))
    ask(hub, "POST", "/api/validate-yaml", json.dumps({"content": hub.token("write")}))
    assert [request.number for request in hub.leaks()] == [request.number for request in hub.log[-3:]]


def test_large_files_come_in_parts(hub, tmp_path):
    hub.part_bytes = 1 << 20
    hub.fault("/lfs/.*/2$", "drop", method="PUT")
    script = 'api.create_repo("tester/parts"); api.upload_folder(repo_id="tester/parts", folder_path=sys.argv[1])'
    run_client(hub, tmp_path / "home", script, folder_of(FILES, tmp_path / "folder"))
    parts = [request for request in hub.requests(f"{hashlib.sha256(LARGE).hexdigest()}/[0-9]+$", method="PUT") if request.status]
    assert [request.received_bytes for request in parts] == [1 << 20, 1 << 20, len(LARGE) - (2 << 20)]
    assert len(hub.requests("/complete$")) == 1
    assert hub.files("tester/parts")["adapter_model.safetensors"] == LARGE


def test_branches_tags_and_stale_parents(hub, tmp_path):
    hub.add_repo("tester/one", {"a.txt": b"one"})
    old = hub.commits("tester/one")[0].oid
    found = run_client(hub, tmp_path / "home", """
repo, old = "tester/one", sys.argv[1]
api.create_branch(repo, branch="v/2")
api.create_branch(repo, branch="v/2", exist_ok=True)
api.create_tag(repo, tag="v1.0", tag_message="first")
found["twice"] = name_of(api.create_tag, repo, tag="v1.0")
new = api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id=repo, revision="v/2", parent_commit=old).oid
found["stale"] = name_of(api.upload_file, path_or_fileobj=b"three", path_in_repo="a.txt", repo_id=repo, revision="v/2",
                         parent_commit=old)
found["texts"] = [Path(hf_hub_download(repo, "a.txt", revision=name)).read_text() for name in ("main", "v/2", "v1.0", old, new)]
refs = api.list_repo_refs(repo)
found["refs"] = [{ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags)]
found["new"] = new
found["none"] = [name_of(api.model_info, repo, revision="nowhere"), name_of(hf_hub_download, repo, "b.txt"),
                 name_of(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, revision="nowhere")]
api.delete_tag(repo, tag="v1.0")
api.delete_branch(repo, branch="v/2")
found["gone"] = name_of(api.model_info, repo, revision="v1.0")
""", old)
    assert found["twice"] == ["HfHubHTTPError", 409] and found["stale"] == ["HfHubHTTPError", 412]
    assert found["texts"] == ["one", "two", "one", "one", "two"]
    assert found["refs"] == [{"main": old, "v/2": found["new"]}, {"v1.0": old}]
    assert found["none"] == [["RevisionNotFoundError", 404], ["RemoteEntryNotFoundError", 404], ["RevisionNotFoundError", 404]]
    assert found["gone"] == ["RevisionNotFoundError", 404]
    assert hub.files("tester/one")["a.txt"] == b"one" and list(hub.repos["tester/one"].branches) == ["main"]


def test_private_and_gated_repositories(hub, tmp_path):
    hub.add_repo("tester/hidden", {"a.txt": b"a"}, private=True)
    hub.add_repo("other/gated", {"a.txt": b"a"}, gated=True)
    hub.add_repo("other/granted", {"a.txt": b"a"}, gated="manual", granted=("tester",))
    script = """
def tried(repo):
    return [name_of(api.model_info, repo), name_of(hf_hub_download, repo, "a.txt")]
found.update({repo: tried(repo) for repo in ("tester/hidden", "other/gated", "other/granted", "tester/none")})
"""
    fine = [["nothing", None]] * 2
    mine = run_client(hub, tmp_path / "mine", script)
    assert mine["tester/hidden"] == mine["other/granted"] == fine
    assert mine["other/gated"] == [["nothing", None], ["GatedRepoError", 403]]
    assert mine["tester/none"] == [["RepositoryNotFoundError", 404]] * 2
    nobody = run_client(hub, tmp_path / "nobody", script, token=None)
    assert nobody["tester/hidden"] == nobody["tester/none"] == [["RepositoryNotFoundError", 401]] * 2
    assert nobody["other/gated"] == nobody["other/granted"] == [["nothing", None], ["GatedRepoError", 401]]
    wrong = run_client(hub, tmp_path / "wrong", script, token="wrong")
    assert wrong["tester/hidden"] == wrong["other/gated"] == [["HfHubHTTPError", 401]] * 2
    stranger = run_client(hub, tmp_path / "stranger", script, token="stranger")
    assert stranger["tester/hidden"] == [["RepositoryNotFoundError", 404]] * 2
    assert {request.user for request in hub.log} == {"tester", "stranger", None}


@pytest.mark.parametrize(("label", "namespaces"), [
    ("write", "tester acme"), ("read", ""), ("fine", "tester"), ("fine-read", ""), ("fine-org", "acme"), ("fine-one", ""),
    ("stranger", "stranger"),
])
def test_who_may_create_and_write(hub, label, namespaces):
    for namespace in ("tester", "acme", "quiet-lab", "stranger", "nobody"):
        wanted = json.dumps({"name": "new", "organization": namespace, "visibility": "private"})
        allowed = namespace in namespaces.split()
        status, _, body = ask(hub, "POST", "/api/repos/create", wanted, token=label)
        assert status == (200 if allowed else 403)
        if allowed:
            assert json.loads(body)["url"] == f"{hub.url}/{namespace}/new" and hub.repos[f"{namespace}/new"].private
            status, _, body = ask(hub, "POST", "/api/repos/create", wanted, token=label)
            assert status == 409 and json.loads(body)["url"] == f"{hub.url}/{namespace}/new"
            assert ask(hub, "DELETE", "/api/repos/delete", wanted, token=label)[0] == 200
            assert f"{namespace}/new" not in hub.repos
        hub.add_repo(f"{namespace}/there")
        status = ask(hub, "POST", f"/api/models/{namespace}/there/commit/main", commit_lines(small("a", b"a")), token=label)[0]
        assert status == (200 if allowed else 403) and len(hub.commits(f"{namespace}/there")) == (2 if allowed else 1)
    assert ask(hub, "POST", "/api/repos/create", json.dumps({"name": "new"}))[0] == 401
    assert ask(hub, "POST", "/api/repos/create", json.dumps({"name": "a--b"}), token="write")[0] == 400
    document = json.loads(ask(hub, "GET", "/api/whoami-v2", token=label)[2])
    access = document["auth"]["accessToken"]
    assert document["name"] == ("stranger" if label == "stranger" else "tester")
    assert access["role"] == ("fineGrained" if label.startswith("fine") else "read" if label == "read" else "write")
    assert ("fineGrained" in access) == label.startswith("fine")


def test_one_repository_for_a_token(hub):
    for name in ("only-this", "another"):
        hub.add_repo(f"tester/{name}", private=True)
    lines = commit_lines(small("a", b"a"))
    assert ask(hub, "POST", "/api/models/tester/only-this/commit/main", lines, token="fine-one")[0] == 200
    assert ask(hub, "POST", "/api/models/tester/another/commit/main", lines, token="fine-one")[0] == 404
    hub.accounts.pop("fine-one")  # a token that is taken back
    assert ask(hub, "GET", "/api/models/tester/only-this", token="fine-one")[0] == 401


@pytest.mark.parametrize(("operations", "status"), [
    ([small("good", b"1"), ("lfsFile", {"path": "b.bin", "algo": "sha256", "oid": "0" * 64, "size": 1})], 400),
    ([small("good", b"1"), ("deletedFile", {"path": "nowhere"})], 404),
    ([small("good", b"1"), ("deletedFolder", {"path": "nowhere/"})], 404),
    ([small("good", b"1"), small("../a", b"1")], 400),
    ([small("good", b"1"), small("model.safetensors", b"1")], 400),
    ([small("good", b"1"), small("README.md", b"---\nlicense: [\n---\n")], 400),
    ([small("good", b"1"), ("file", {"path": "b", "content": "%"})], 400),
    ([small("a.txt", b"one")], 400),
    ([], 400),
])
def test_commits_are_whole_or_not_at_all(hub, operations, status):
    repo = hub.add_repo("tester/one", {"a.txt": b"one"})
    before = repo.branches["main"]
    assert ask(hub, "POST", "/api/models/tester/one/commit/main", commit_lines(*operations), token="write")[0] == status
    assert repo.branches["main"] == before and "good" not in hub.files("tester/one")


def test_large_files_are_checked(hub):
    repo, oid = hub.add_repo("tester/one"), hashlib.sha256(b"weights").hexdigest()
    address = f"/lfs/{repo.number}/{oid}"
    assert ask(hub, "PUT", hub.signed(address), b"other weights")[0] == 400
    assert ask(hub, "PUT", hub.storage_url + address, b"weights")[0] == 403
    verify, wanted = "/tester/one.git/info/lfs/objects/verify", json.dumps({"oid": oid, "size": 7})
    assert ask(hub, "POST", verify, wanted, token="write")[0] == 404
    assert ask(hub, "PUT", hub.signed(address), b"weights")[0] == 200
    assert ask(hub, "POST", verify, wanted, token="write")[0] == 200
    status, headers, body = ask(hub, "GET", hub.signed(address), headers={"Range": "bytes=2-3"})
    assert (status, headers["Content-Range"], body) == (206, "bytes 2-3/7", b"ig")
    assert ask(hub, "GET", hub.signed(address), headers={"Range": "bytes=7-"})[0] == 416
    assert hub.requests("/lfs/", method="GET")[0].range == "bytes=2-3"


@pytest.mark.parametrize(("card", "message"), [
    ("---\nlicense: [\n---\n", "YAML"), ("---\n- a\n---\n", "object"), ("---\nlicense: mine\n---\n", '"license" must be one of'),
    ("---\nbase_model: /home/me/model\n---\n", '"base_model" with value'), ("---\ntags: lora\n---\n", '"tags" must be an array'),
    ("---\ntags: [1]\n---\n", '"tags[0]" must be a string'), ("---\nlibrary_name: [peft]\n---\n", "library_name"),
    ("---\nbase_model_relation: child\n---\n", "base_model_relation"), ("---\ndatasets: [a/b/c]\n---\n", '"datasets" with value'),
    ("---\r\nbase_model: me/a\r\nlicense: other\r\ntags: [a]\r\n---\r\n", None), ("# no metadata\n", None),
    ("text\n---\nlicense: [\n---\n", None),
])
def test_metadata_of_cards_is_checked(hub, card, message):
    status, _, body = ask(hub, "POST", "/api/validate-yaml", json.dumps({"content": card, "repoType": "model"}), token="write")
    errors = [error["message"] for error in json.loads(body)["errors"]]
    assert (status, bool(errors)) == ((200, False) if message is None else (400, True))
    assert message is None or message in errors[0]
    assert bool(json.loads(body)["warnings"]) == (message is None and not card.startswith("---"))


def test_xet_is_not_there(hub):
    hub.add_repo("tester/one")
    status, headers, _ = ask(hub, "GET", "/api/models/tester/one/xet-write-token/main", token="write")
    assert status == 404 and "X-Error-Code" not in headers


def test_started_by_hand(root, tmp_path):
    command = [sys.executable, "-u", "-m", "tests.loopback_hub", "0"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        found = re.search(r"export HF_ENDPOINT=http://127\.0\.0\.1:(\d+) HF_TOKEN=(hf_[A-Za-z]{34}) ", lines[1])
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
        connection.request("GET", "/api/whoami-v2", headers={"Authorization": f"Bearer {found[2]}"})
        assert json.loads(connection.getresponse().read())["name"] == "tester"
    finally:
        process.terminate()
        process.wait(10)
