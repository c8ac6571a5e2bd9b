"""What goes wrong between a finished run and the Hub: the real program and the real client against the Hub of loopback_hub.

Of every row of hub_rows.py: how it ends and what it says, in how long at most, with nothing of the run changed, no torn
repository and no token told to anybody; and that the same command afterwards leaves exactly one commit with all of it.
`scripts/hub_faults` runs all rows, the long ones included, and writes the table of qlora/hub/README.md.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_rows import ROWS, Row
from hub_runs import Scene, digests, finished_run
from loopback_hub import LoopbackHub


def play_push(row: Row, scene: Scene) -> SimpleNamespace:
    """The first try with the fault, and the second without."""
    row.arrange(scene)
    first = scene.push(minutes=row.minutes, within=row.seconds)
    done = first_try(row, scene, first)
    after_first, after_second = row.commits or ((1, 1) if row.code == 0 else (0, 1))
    assert scene.num_commits == after_first, scene.hub.transcript()
    if row.code == 0:
        scene.check_whole(besides=row.besides)
    mend(row, scene)
    again = scene.push(minutes=2, within=45).wait()
    assert again.code == 0, again.err + scene.hub.transcript()
    assert scene.num_commits == after_second, scene.hub.transcript()
    assert ("Everything is there already" in again.out) == (after_first == after_second)
    scene.check_whole(besides=row.besides)
    return SimpleNamespace(first=done, second="nothing to send, no second commit" if after_first == after_second else "arrives")


def play_fetch(row: Row, scene: Scene) -> SimpleNamespace:
    """The same of a download; what comes is what was pushed, byte for byte."""
    scene.hub.add_repo(scene.repo, scene.expected(), private=True)
    row.arrange(scene)
    done = first_try(row, scene, scene.fetch(minutes=row.minutes, within=row.seconds))
    if row.code == 0:
        check_fetched(scene, done.out)
    mend(row, scene)
    again = scene.fetch(minutes=2, within=45).wait()
    assert again.code == 0, again.err + scene.hub.transcript()
    check_fetched(scene, again.out)
    return SimpleNamespace(first=done, second="comes, checked")


def first_try(row, scene, running):
    if row.during:
        row.during(scene, running)
    done = running.wait()
    assert done.code == row.code, done.err + scene.hub.transcript()
    for words in row.says:
        assert words in done.err, f"{words!r} is not in:\n{done.err}"
    if row.check:
        row.check(scene, done)
    return done


def mend(row, scene):
    scene.hub.clear_faults()
    scene.token, scene.endpoint = "write", scene.hub.url
    if row.mend:
        row.mend(scene)


def check_fetched(scene, out):
    folder, expected = Path(json.loads(out)), scene.expected()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == expected[name]


def play(row, run, before, home):
    with LoopbackHub() as hub:
        scene = Scene(hub, run, before, home)
        return play_fetch(row, scene) if row.fetches else play_push(row, scene)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_model):
    """A finished run that all rows share: nobody may change it."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    answer = {"role": "assistant", "content": "the cat sat"}
    conversations = ([{"role": "user", "content": f"say {i}"}, answer] for i in range(40))
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
    return finished_run(tmp_path_factory.mktemp("run"), small_model, rows)


@pytest.fixture(scope="module")
def stories(request, run, tmp_path_factory):
    """All rows that are asked for, some at a time: what most of them do is wait."""
    wanted = [item.callspec.params["row"] for item in request.session.items
              if item.path == request.path and "row" in getattr(getattr(item, "callspec", None), "params", {})]
    before = digests(run)
    with ThreadPoolExecutor(3) as pool:
        yield {row.name: pool.submit(play, row, run, before, tmp_path_factory.mktemp("home"))
               for row in sorted(wanted, key=lambda row: -row.seconds)}  # what may take longest, first
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=[pytest.mark.long] if row.long else []) for row in ROWS])
def test_every_row_holds(row, stories, record_property):
    story = stories[row.name].result()
    outcome = row.outcome.format(limit=row.minutes * 60)
    record_property("hub_fault", [row.name, outcome, row.second or story.second, story.first.seconds])


@pytest.mark.long
@pytest.mark.parametrize("name, fault", [
    ("429 from the card of the base, `Retry-After: 3600`", {"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}}),
    ("the card of the base is never answered", {"kind": "delay"}),
])
def test_the_licence_of_a_base_holds_no_push_up(name, fault, hub, run, tmp_path, record_property):
    hub.add_repo("me/base", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.fault("/me/base/", times=None, **fault)
    scene = Scene(hub, run, digests(run), tmp_path)
    scene.base = "me/base"
    first = scene.push(minutes=2, within=25).wait()
    assert first.code == 0 and scene.num_commits == 1, first.err
    assert b"license: mit" not in hub.files(scene.repo)["README.md"]
    hub.clear_faults()
    assert scene.push(minutes=2, within=25).wait().code == 0 and scene.num_commits == 2
    assert b"license: mit" in hub.files(scene.repo)["README.md"]
    outcome, second = "arrives; the card does not know the licence", "the card with the licence, as a second commit"
    record_property("hub_fault", [name, outcome, second, first.seconds])
