"""Send an adapter to the Hub. By the time this runs, everything is on disk."""

from __future__ import annotations

from pathlib import Path

from qlora.errors import OutputError, PushError


def find_adapter(folder: Path) -> Path:
    """The adapter folder of a run.

    Raises:
        OutputError: there is none, so there is nothing to push; or it holds links, which could lead anywhere.
    """
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            links = sorted(path.name for path in candidate.rglob("*") if path.is_symlink())
            if links:  # what they lead to would be sent
                raise OutputError(f"{candidate} holds links, which a run does not make: {', '.join(links[:3])}.",
                                  "Put the files that are meant in their place, or remove them.")
            return candidate
    raise OutputError(f"{folder} holds no adapter/adapter_config.json.", "Name a run folder that a finished run left behind.")


def push_adapter(adapter: Path, repo: str, *, private: bool = True) -> str:
    """Upload the files of `adapter` as one commit; returns the repository's address.

    Calling it again after a failure is safe: files that are there already are not sent twice, and an unchanged folder
    makes no second commit.

    Raises:
        PushError: the adapter did not arrive. It is still on disk.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=str(adapter), commit_message="Adapter trained with qlora")
    except Exception as error:
        # The client lets its transport's own exceptions through (huggingface_hub 2.4), so no narrower list is complete.
        # None of them may cost a finished run, and all of them end here, as one error with the way to finish.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PushError(
            f"The adapter was trained and saved in {adapter}, but not pushed to {repo}: {reason}",
            f"Check `hf auth whoami` (a token with write access is needed), then run: qlora push {adapter.parent} {repo}"
            + ("" if private else " --public"),
        ) from error
    return str(created)
