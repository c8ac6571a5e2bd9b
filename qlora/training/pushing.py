"""The push that a recipe asks for: looked into before training, and made when everything is on disk."""

from __future__ import annotations

from pathlib import Path

from qlora.errors import HubError, OutputError, PushError
from qlora.hub.destination import Destination, Target, create, find_destination
from qlora.hub.parcel import public_name
from qlora.hub.patience import Patience, client
from qlora.hub.push import Order, Pushed, tag_commit, taken_tag
from qlora.hub.push import push as push_run
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.training.preflight import Check

# Longer is nobody kept from training by a slow server.
_LOOK_SECONDS = 120.0


def look_ahead(recipe: Recipe, progress: Progress, *, create_it: bool) -> Destination | None:
    """Find out whether the push at the end can succeed, before any time is spent; None without a hub section, or where it may
    fail.

    Args:
        create_it: also make the repository, empty: whether that is allowed is known only when it is done.

    Raises:
        HubError: it cannot succeed, and hub.required is true.
    """
    if recipe.hub is None:
        return None
    target = target_of(recipe)
    try:
        with Patience(_LOOK_SECONDS, tell=progress.note) as patience, progress.stage(f"Asking the Hub about {target.repo}"):
            found = find_destination(target, recipe.hub.base_model or public_name(recipe.model.base), patience)
            if target.tag and found.exists and (at := tag_commit(client(patience), found.repo, target.tag, patience)):
                raise taken_tag(target, found.repo, at)  # what is to be trained cannot be what is there
            found = create(found, target, patience) if create_it else found
    except HubError as error:
        if recipe.hub.required:
            raise HubError(error.problem, f"{error.fix}\nhub.required=false trains all the same; leaving the hub section out "
                           "pushes nothing.") from error
        progress.note(f"The push will probably fail: {error.problem} {error.fix}")
        return None
    for note in found.notes:
        progress.note(note)
    return found


def check_hub(recipe: Recipe, progress: Progress) -> list[Check]:
    """The same as a line of `qlora check`; nothing is created."""
    if recipe.hub is None:
        return []
    needed = f"a token that may write to {recipe.hub.repo}, and room for an adapter there"
    strict = recipe.model_copy(update={"hub": recipe.hub.model_copy(update={"required": True})})
    try:
        found = look_ahead(strict, progress, create_it=False)
    except HubError as error:
        return [Check("Hub", needed, error.problem, ok=False, fix=error.fix, level="error" if recipe.hub.required else "warning")]
    return [Check("Hub", needed, f"{found.repo}, {'which is there' if found.exists else 'to be created'}", ok=True)]


def push_finished(recipe: Recipe, folder: Path, progress: Progress) -> Pushed:
    """Push a run that has just ended.

    Raises:
        PushError: it did not arrive. Nothing on disk has changed, and the error names the command that finishes the push.
    """
    order = order_of(recipe, folder)
    try:
        return push_run(order, progress)
    except PushError:
        raise
    except (HubError, OutputError) as error:
        raise PushError(f"The run in {folder} is finished, but not pushed to {order.target.repo}: {error.problem}",
                        f"{error.fix}\nThen: {order.command}") from error


def order_of(recipe: Recipe, folder: Path) -> Order:
    """The hub section of a recipe as an order."""
    hub = recipe.hub
    return Order(folder, target_of(recipe), base_model=hub.base_model, samples=hub.samples, max_minutes=hub.max_minutes)


def target_of(recipe: Recipe) -> Target:
    """Where a recipe's hub section leads."""
    return Target(recipe.hub.repo, private=recipe.hub.private, revision=recipe.hub.revision, tag=recipe.hub.tag)
