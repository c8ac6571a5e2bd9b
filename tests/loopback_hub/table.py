"""Which function answers which call. Names in paths are matched as they were sent, so that a quoted slash ends no name."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote

from . import pushing, routes
from .calls import Answer, Call

_REPO = "(?P<repo>[^/]+/[^/]+)"
_API = f"/api/models/{_REPO}"
_AT = "(?P<revision>[^/]+)"
_LARGE = f"/{_REPO}[.]git/info/lfs/objects"

HUB = [
    ("GET", "/api/whoami-v2", routes.whoami),
    ("POST", "/api/validate-yaml", routes.validate_yaml),
    ("POST", "/api/repos/create", routes.create_repo),
    ("DELETE", "/api/repos/delete", routes.delete_repo),
    ("GET", _API, routes.model_info),
    ("GET", f"{_API}/revision/{_AT}", routes.model_info),
    ("GET", f"{_API}/tree/{_AT}(/(?P<path>.+))?", routes.tree),
    ("POST", f"{_API}/paths-info/{_AT}", routes.paths_info),
    ("GET", f"{_API}/refs", routes.refs),
    ("GET", f"{_API}/commits/{_AT}", routes.commits),
    ("POST", f"{_API}/branch/(?P<name>[^/]+)", routes.create_branch),
    ("DELETE", f"{_API}/branch/(?P<name>[^/]+)", routes.delete_branch),
    ("POST", f"{_API}/tag/(?P<name>[^/]+)", routes.create_tag),
    ("DELETE", f"{_API}/tag/(?P<name>[^/]+)", routes.delete_tag),
    ("PUT", f"{_API}/settings", routes.settings),
    ("GET", f"{_API}/auth-check", routes.auth_check),
    ("GET", f"{_API}/auth-check/write", routes.auth_check_write),
    ("GET", f"{_API}/xet-(read|write)-token/{_AT}", routes.no_xet),
    ("POST", f"{_API}/preupload/{_AT}", pushing.preupload),
    ("POST", f"{_API}/commit/{_AT}", pushing.commit),
    ("POST", f"{_LARGE}/batch", pushing.batch),
    ("POST", f"{_LARGE}/verify", pushing.verify),
    ("POST", f"{_LARGE}/(?P<oid>[0-9a-f]+)/complete", pushing.complete),
    ("GET|HEAD", f"/{_REPO}/resolve/{_AT}/(?P<path>.+)", routes.resolve),
]
STORAGE = [
    ("PUT", "/lfs/(?P<number>[0-9]+)/(?P<oid>[0-9a-f]+)(/(?P<part>[0-9]+))?", pushing.put_blob),
    ("GET|HEAD", "/lfs/(?P<number>[0-9]+)/(?P<oid>[0-9a-f]+)", pushing.get_blob),
]


def find(origin: str, method: str, raw_path: str) -> tuple[Callable[[Call], Answer], dict[str, str]] | None:
    """The route of a call and the names in its path, unquoted; None where there is no such route."""
    for methods, pattern, route in HUB if origin == "hub" else STORAGE:
        match = re.fullmatch(pattern, raw_path)
        if match and re.fullmatch(methods, method):
            return route, {name: unquote(value) for name, value in match.groupdict().items() if value}
    return None
