"""Write so that a power cut finds the old or the new, and never a half."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text: on the disk when this returns; until then what was there before stays.

    Raises:
        OSError: it cannot be written.
    """
    aside = path.with_name(f".{path.name.lstrip('.')}.part")
    try:
        # Names of files that are not UTF-8 reach us as lone surrogates; as \udcXX they are JSON, and read back the same.
        with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):  # as unwritable as the file itself
            aside.unlink(missing_ok=True)
        raise


def sync_tree(folder: Path) -> None:
    """Bring every file below a folder to the disk, and their names.

    Raises:
        OSError: not everything is there.
    """
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("r+b") as file:  # for writing too: Windows syncs nothing else
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring names in a folder to the disk. Windows opens no folders, and some network file systems cannot do it.

    Raises:
        OSError: the disk does not take them.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
