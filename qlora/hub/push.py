"""Send a finished run to the Hub: as one commit, which is there or not, and then hold the server to it.

By the time this runs, everything is on disk, and nothing here writes into the run folder. Running it again finishes what was
broken off: files that have arrived are not sent twice, and a repository that holds all of it already gets no second commit.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import HubError, PushError, QloraError, UnreachableError
from qlora.hub.destination import Destination, Target, check_target, create, find_destination, look, read_text
from qlora.hub.licences import find_licence
from qlora.hub.parcel import CARD, CARD_BESIDE, Item, Parcel, find_run, gather, read_json
from qlora.hub.patience import Patience, client, describe, explained
from qlora.hub.upload import commit, difference, is_there
from qlora.progress import Progress
from qlora.results.model_card import is_unedited
from qlora.results.report import load_report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# How often a repository that others change meanwhile is looked at anew.
_LOOKS = 4


@dataclass(frozen=True)
class Pushed:
    """What arrived.

    Attributes:
        url: of the repository.
        commit: the commit that holds it all.
        sent: paths that were written in it; empty where the repository held everything already.
        notes: what is worth a line to the user.
    """

    repo: str
    url: str
    commit: str
    base: str
    sent: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """A push as a person asks for it. `max_minutes` is for all of it, retries included."""

    run: Path
    target: Target
    base_model: str | None = None
    samples: bool = False
    max_minutes: float = 60.0

    @property
    def command(self) -> str:
        """The command that does the same, and finishes it where it was broken off."""
        words = ["qlora", "push", str(self.run), self.target.repo]
        words += [] if self.target.private else ["--public"]
        words += [] if self.target.revision == "main" else ["--revision", self.target.revision]
        words += ["--tag", self.target.tag] if self.target.tag else []
        words += ["--base-model", self.base_model] if self.base_model else []
        words += ["--samples"] if self.samples else []
        return shlex.join(words)


def order_for(
    folder: Path, repo: str | None = None, *, public: bool = False, revision: str | None = None, tag: str | None = None,
    base_model: str | None = None, samples: bool = False, max_minutes: float | None = None,
) -> Order:
    """The push of a finished run as a command line says it. What it does not say is taken from the run's own recipe; a repository
    that neither names is called like the run.

    Raises:
        OutputError: there is no finished run.
    """
    run = find_run(folder)
    hub = (read_json(run / "resolved.json").get("recipe") or {}).get("hub") or {}
    base_model = base_model or hub.get("base_model")
    if repo not in (None, hub.get("repo")):
        hub = {}  # branch and visibility of another repository
    target = Target(
        repo or hub.get("repo") or run.resolve().name, private=not public and hub.get("private", True),
        revision=revision or hub.get("revision", "main"), tag=tag or hub.get("tag"),
    )
    return Order(run, target, base_model, samples or hub.get("samples", False), max_minutes or hub.get("max_minutes", 60.0))


def pack(order: Order, progress: Progress | None = None) -> Parcel:
    """What the order would send, without asking the Hub for more than the licence of the base.

    Raises:
        OutputError: there is no finished run.
        HubError: a name that cannot be, or a file that would be sent holds a secret.
    """
    run = find_run(order.run)
    check_target(order.target)
    facts = load_report(run).model
    with (progress or Progress()).stage("Gathering what is to be sent"):
        licence = find_licence(order.base_model or facts.base, None if order.base_model else facts.revision)
        return gather(run, order.target.repo, base_model=order.base_model, licence=licence, samples=order.samples)


def push_run(folder: str | Path, repo: str | None = None, progress: Progress | None = None, **wishes: Any) -> Pushed:
    """Send a finished run to the Hub, from Python: `push_run("runs/chat", "me/chat-adapter", tag="v1")`.

    Args:
        wishes: see `order_for`.

    Raises:
        OutputError, HubError, PushError: see `push`.
    """
    return push(order_for(Path(folder), repo, **wishes), progress)


def push(order: Order, progress: Progress | None = None) -> Pushed:
    """Send a finished run.

    Raises:
        OutputError: there is no finished run.
        HubError: it cannot be pushed as it is: token, name, what is there. Nothing has been sent.
        PushError: it did not arrive, or not whole. The run is on disk as before, and the error names the command that finishes
        it.
    """
    progress = progress or Progress()
    order = replace(order, run=find_run(order.run))
    try:
        with Patience(order.max_minutes * 60, tell=progress.note) as patience:
            with progress.stage(f"Looking at {order.target.repo}"):
                parcel = pack(order)
                found = find_destination(order.target, parcel.base, patience)
                target = replace(order.target, repo=found.repo)
                parcel = pack(replace(order, target=target)) if found.repo != order.target.repo else parcel
                refuse_taken_tag(parcel, target, found, patience)
            return _push(parcel, target, found, patience, progress)
    except KeyboardInterrupt:
        raise PushError(f"The push of {order.run} to {order.target.repo} was interrupted. The repository holds all of it or "
                        "nothing of it; the run is as it was.", f"To finish it: {order.command}", exit_code=130) from None
    except (PushError, UnreachableError) as error:
        raise PushError(f"{error.problem} The run in {order.run} is as it was.",
                        f"To finish the push: {order.command}") from error
    except QloraError:
        raise
    except Exception as error:
        # The client lets its transport's own exceptions through (huggingface_hub 2.4), so no narrower list is complete. None of
        # them may cost a finished run, and all of them end here, as one error with the way to finish.
        raise PushError(f"The run in {order.run} did not reach {order.target.repo}: {describe(error)} The run is as it was.",
                        f"To finish the push: {order.command}") from error


def _push(parcel: Parcel, target: Target, found: Destination, patience: Patience, progress: Progress) -> Pushed:
    api = client(patience)
    notes = list(found.notes)
    with failures_named(f"The run did not reach {found.repo}"):
        found = create(found, target, patience)
        for _ in range(_LOOKS):
            items, note = settle_card(parcel, found, api, patience)
            change = difference(items, found.files)
            if not change:
                break
            with failures_named(f"The run did not reach {found.repo}, where {change} are missing"):
                title = f"LoRA adapter for {parcel.base}, trained with qlora"
                arrived = commit(api, found, change, target, title, patience, progress)
            found = look(api, found.repo, target.revision, patience)
            if arrived:  # otherwise somebody else was faster
                break
        missing = difference(items, found.files)
    if missing:
        raise PushError(f"{found.repo} does not hold what was sent, by size or checksum: {missing}.")
    if target.tag:
        with failures_named(f"All files are in {found.repo}, but the tag {target.tag} is not set"):
            set_tag(api, target, found, patience)
    url = f"{api.endpoint}/{found.repo}" + ("" if target.revision == "main" else f"/tree/{target.revision}")
    sent = tuple(item.path for item in change.items)
    return Pushed(found.repo, url, found.head, parcel.base, sent, (*notes, *filter(None, [note])))


# --- details -----------------------------------------------------------------------------------------------------------


def settle_card(parcel: Parcel, found: Destination, api: HfApi, patience: Patience) -> tuple[tuple[Item, ...], str]:
    """The files with the card where it may go, and a line about it: a README.md that people have edited on the Hub stays as it
    is.
    """
    if CARD not in found.files or is_there(parcel.card, found.files):
        return parcel.items, ""
    if is_unedited(read_text(api, found, CARD, patience)):
        return parcel.items, ""
    beside = replace(parcel.card, path=CARD_BESIDE)
    items = tuple(beside if item.path == CARD else item for item in parcel.items)
    return items, f"{CARD} of {found.repo} has been edited there and stays; the new card is beside it, as {CARD_BESIDE}."


def refuse_taken_tag(parcel: Parcel, target: Target, found: Destination, patience: Patience) -> None:
    """A tag is never moved: whoever pinned it would get another adapter.

    Raises:
        HubError: it is there already, and not at a commit that holds just what this push would send.
    """
    api = client(patience)
    if not target.tag or not found.exists or (at := tag_commit(api, found.repo, target.tag, patience)) is None:
        return
    items, _ = settle_card(parcel, found, api, patience)
    if at != found.head or difference(items, found.files):
        raise taken_tag(target, found.repo, at)


def taken_tag(target: Target, repo: str, at: str) -> HubError:
    """That the tag is somewhere else."""
    return HubError(f"{repo} has a tag {target.tag} already, at commit {at[:8]}, and tags are not moved.",
                    "Take another name for this version, such as the next number.")


def tag_commit(api: HfApi, repo: str, tag: str, patience: Patience) -> str | None:
    """The commit that a tag stands for; None where there is no such tag."""
    with explained(f"The tags of {repo} cannot be listed"):
        refs = patience.call(f"listing the tags of {repo}", lambda: api.list_repo_refs(repo))
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def set_tag(api: HfApi, target: Target, found: Destination, patience: Patience) -> None:
    """Put the tag onto what has been pushed; where it is there already, see that it is the same commit.

    Raises:
        HubError: it is not there afterwards, or at another commit.
    """
    if tag_commit(api, found.repo, target.tag, patience) is None:
        with explained(f"The tag {target.tag} cannot be set"):
            patience.call(f"setting the tag {target.tag}",
                          lambda: api.create_tag(found.repo, tag=target.tag, revision=found.head, exist_ok=True))
    at = tag_commit(api, found.repo, target.tag, patience)
    if at != found.head:
        raise taken_tag(target, found.repo, at or "none")


@contextmanager
def failures_named(problem: str) -> Iterator[None]:
    """Whatever goes wrong once something may have been sent is a PushError: the run is finished, and the push is not."""
    try:
        yield
    except PushError:
        raise
    except HubError as error:
        raise PushError(f"{problem}: {error.problem[:1].lower()}{error.problem[1:]}") from error
    except Exception as error:
        raise PushError(f"{problem}: {describe(error)}") from error
