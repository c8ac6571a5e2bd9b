"""Calls to a server that may be slow, busy, or gone: tried again where that helps, and never waited for without end.

The client (huggingface_hub 1.31 to 2.4) retries the upload of a file by itself, but neither who-am-I, nor the creation of a
repository, nor the commit; and it has no time-out but for downloads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from qlora import _compat
from qlora.errors import HubError, UnreachableError
from qlora.redact import redact
from qlora.units import format_seconds

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_Result = TypeVar("_Result")

# What a server that is alive answers within, at most. A commit of many large files takes the Hub some seconds.
_ANSWER_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_AGAIN = ("Look at the connection, and at HF_ENDPOINT if it is set; then run the same command again: what has arrived is not "
          "sent twice.")
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class Patience:
    """How long one piece of work with the Hub may take, and how often it asks again. A context manager: what the process does
    with the client afterwards is not held to it.

    Args:
        total_seconds: after that, it is given up.
        stall_seconds: the same where for so long nothing has been answered, and nothing been sent. What is sent to a server that
            never answers is quickly gone, into the buffers of the connection; the silences after each such attempt add up.
        tell: told in one line when something is tried again.
    """

    def __init__(self, total_seconds: float, *, stall_seconds: float = 180.0, tell: Callable[[str], None] | None = None):
        self.total_seconds, self.stall_seconds = total_seconds, min(stall_seconds, total_seconds)
        self._tell = tell or (lambda line: None)
        self._began = self._last_move = time.monotonic()
        self._quiet_seconds = 0.0  # of earlier requests, since the last answer
        self._doing = "the work with the Hub"
        self._finished = False

    def __enter__(self) -> Patience:
        return self

    def __exit__(self, *_: object) -> None:
        self._finished = True

    @property
    def answer_seconds(self) -> float:
        """The time-out of a single request."""
        return min(_ANSWER_SECONDS, self.stall_seconds)

    def sign_of_life(self) -> None:
        """Something has come from the server."""
        self._last_move, self._quiet_seconds = time.monotonic(), 0.0

    def sent(self) -> None:
        """Something has left for the server, which does not mean that it has arrived."""
        self._last_move = time.monotonic()

    def asking(self) -> None:
        """To be called before every request.

        Raises:
            UnreachableError: the time is over.
        """
        self.check()
        self._add_silence()

    def answered(self, response: Any) -> None:
        """To be called with every answer. The client sleeps for as long as a busy server asks, and looks at no clock of ours, so
        that a pause that cannot be afforded is found here.

        Raises:
            UnreachableError: the server wants to be asked again later than the time is over.
        """
        self.sign_of_life()
        pause = pause_in(response.headers) if response.status_code in _PASSING else None
        if pause is None or self._finished:
            return
        if time.monotonic() + pause - self._began > self.total_seconds:
            raise UnreachableError(
                f"The server answered {response.status_code}, and wants to be asked again in {format_seconds(pause)}; this work "
                f"may take {format_seconds(self.total_seconds)} in all.",
                "Run the same command again then: it goes on from what has arrived.")
        self._last_move += pause  # silence that was announced

    def check(self) -> None:
        """To be called while a file is sent.

        Raises:
            UnreachableError: the time is over.
        """
        self._afford(0.0, None)

    def call(self, what: str, function: Callable[[], _Result], *, attempts: int = 6) -> _Result:
        """Run the function; where the server or the way to it fails for now, wait and run it again.

        It must be safe to run twice. Waits 1, 2, 4 ... 30 seconds, or as long as the server asks for (Retry-After, RateLimit).

        Args:
            what: the piece of work as the beginning of a line, "creating me/it".

        Raises:
            UnreachableError: attempts or time are used up; names `what` and the last reason. Everything else comes through as
                it is, as it would come again.
        """
        for attempt in range(1, attempts + 1):
            try:
                self._doing = what
                self.check()
                result = function()
                self.sign_of_life()
                return result
            except Exception as error:
                cause = passing_cause(error)
                if cause is None:
                    ours = next((each for each in chain(error) if isinstance(each, HubError)), None)
                    raise ours or error
                reason, pause = describe(cause), asked_pause(cause)
                if pause is None:
                    pause = min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
                else:
                    self.sign_of_life()  # a server that says when to come back is alive
                if attempt == attempts:
                    raise UnreachableError(f"{_capital(what)} did not succeed in {attempts} attempts: {reason}",
                                          _AGAIN) from error
                self._afford(pause, error)
                self._tell(f"{_capital(what)}: {reason} Trying again in {format_seconds(pause)}.")
                self._add_silence()
                time.sleep(pause)
                self.sent()  # our own silence
        raise AssertionError("left by return or raise")

    def _add_silence(self) -> None:
        now = time.monotonic()
        self._quiet_seconds += max(0.0, now - self._last_move)
        self._last_move = now

    def _afford(self, pause: float, error: Exception | None) -> None:
        """Raises UnreachableError where a pause of so many seconds would go past the end."""
        if self._finished:
            return
        now = time.monotonic()
        over = now + pause - self._began > self.total_seconds
        stalled = pause == 0 and self._quiet_seconds + now - self._last_move > self.stall_seconds
        if over or stalled:
            last = passing_cause(error) if error is not None else None
            reason = f" The last answer: {describe(last)}" if last is not None else ""
            spent = f"it was not finished in the {format_seconds(self.total_seconds)} that all may take" if over else (
                f"nothing was heard from the server for {format_seconds(self.stall_seconds)}")
            raise UnreachableError(f"{_capital(self._doing)}: {spent}.{reason}", _AGAIN) from error


def client(patience: Patience) -> HfApi:
    """The Hub's client, whose requests end when the patience does.

    The token is the client's own affair: it takes it from HF_TOKEN or from `hf auth login`, and sends it to no other origin.
    """
    from huggingface_hub import HfApi

    _compat.limit_requests(patience.answer_seconds, before=patience.asking, after=patience.answered)
    return HfApi(library_name="qlora")


def passing_cause(error: BaseException) -> Exception | None:
    """The part of an error that may be gone at the next attempt; None where there is none.

    Upload workers wrap what they met, so the causes are looked through as well.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    for each in chain(error):
        if isinstance(each, (HubError, OfflineModeIsEnabled)):
            return None
        status = status_of(each)
        if status is not None:
            return each if status in _PASSING else None
        if isinstance(each, (_compat.transport_errors(), ConnectionError, TimeoutError)):
            return each
    return None


def chain(error: BaseException) -> Iterator[Exception]:
    """The error and what it was raised from, the outermost first."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while isinstance(each, Exception) and each not in seen:
        seen.append(each)
        yield each
        each = each.__cause__ or each.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the client stands for."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def asked_pause(error: Exception) -> float | None:
    """Seconds after which the server wants to be asked again; None where it does not say.

    Retry-After in seconds or as a date (RFC 9110, section 10.2.3), or the Hub's `ratelimit: "api";r=0;t=55`
    (https://huggingface.co/docs/hub/rate-limits).
    """
    return pause_in(getattr(getattr(error, "response", None), "headers", None) or {})


def pause_in(headers: Mapping[str, str]) -> float | None:
    """The same of an answer's headers."""
    text = (headers.get("retry-after") or "").strip()
    if text.isdecimal():
        return float(text) + 1  # servers count in whole seconds
    if text:
        try:
            then = parsedate_to_datetime(text)
        except ValueError:
            return None
        if then.tzinfo is None:
            then = then.replace(tzinfo=timezone.utc)
        return max(0.0, (then - datetime.now(timezone.utc)).total_seconds()) + 1
    limit = dict(part.strip().partition("=")[::2] for part in (headers.get("ratelimit") or "").split(";"))
    # The header is on other answers too; only with nothing remaining it asks for a pause.
    return float(limit["t"]) + 1 if limit.get("r") == "0" and limit.get("t", "").isdecimal() else None


def describe(error: BaseException) -> str:
    """One sentence of what came back, without secrets."""
    while isinstance(error, RuntimeError) and error.__cause__:  # "Error while uploading", of the client's workers
        error = error.__cause__
    status = status_of(error)
    text = getattr(error, "server_message", None) or str(error)
    line = redact(next((line.strip() for line in str(text).splitlines() if line.strip()), ""))[:300].rstrip(".")
    if status is not None:
        return f"the server answered {status}{f' ({line})' if line else ''}."
    kind = type(error).__name__
    return f"{line} ({kind})." if line else f"the connection failed ({kind})."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Turn an answer of the server that no second attempt would change into a HubError whose sentence begins with `problem`."""
    try:
        yield
    except _compat.request_errors() as error:
        raise HubError(f"{problem}: {describe(error)}", _FIXES.get(status_of(error), _LOOK)) from error


_LOOK = "`hf auth whoami` says who this machine is to the Hub."
_FIXES = {
    None: "Look at HF_ENDPOINT: it is the whole address of a Hub, such as https://hub.example.org.",
    401: "The token is not known to the server: `hf auth login` with a new one, or put it into HF_TOKEN.",
    402: "The plan of that account does not allow it; its billing settings on the Hub say more.",
    403: "Take a token of the kind write, of an account that may write there; `hf auth whoami` shows whose this one is.",
    404: f"Check the name; a private repository of others looks as if it were not there. {_LOOK}",
    429: "The server wants to be left alone for a while; run the same command again later.",
}
