"""Patience with a server: what is tried again, after how long, and when it is given up. The clock is one that the tests turn."""

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from qlora import _compat
from qlora.errors import HubError, UnreachableError
from qlora.hub import patience as module
from qlora.hub.patience import Patience, asked_pause, chain, describe, passing_cause, pause_in


class Answered(Exception):
    """As the client's errors: with the response that they stand for."""

    def __init__(self, status: int, text: str = "", **headers: str):
        super().__init__(text)
        named = {name.replace("_", "-").lower(): value for name, value in headers.items()}
        self.response = SimpleNamespace(status_code=status, headers=named)


def transport_error(name="ConnectError"):
    """One that the HTTP library beneath the client raises."""
    kind = next(each for each in _compat.transport_errors())
    library = __import__(kind.__module__.partition(".")[0])
    return getattr(library, name)("gone")


class Clock:
    """Seconds pass only where somebody sleeps, or the test says so."""

    def __init__(self):
        self.now, self.slept = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    turned = Clock()
    monkeypatch.setattr(module, "time", turned)
    return turned


def failing(*errors, then="done"):
    """A function that raises these, one a call, and then returns; `calls` counts."""
    left = list(errors)

    def function():
        function.calls += 1
        if left:
            error = left.pop(0)
            raise error() if callable(error) else error
        return then

    function.calls = 0
    return function


# --- what is tried again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    *(Answered(status) for status in (408, 425, 429, 500, 502, 503, 504)), ConnectionResetError("reset"), TimeoutError("slow"),
    *(transport_error(name) for name in ("ConnectError", "ReadError", "WriteError", "ReadTimeout", "ConnectTimeout",
                                         "RemoteProtocolError")),
], ids=lambda error: f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', '')}")
def test_what_may_pass_is_tried_again(clock, error):
    function = failing(error, error)
    assert Patience(600).call("the work", function) == "done"
    assert function.calls == 3 and clock.slept == [1, 2]


@pytest.mark.parametrize("error", [
    *(Answered(status) for status in (400, 401, 402, 403, 404, 409, 412, 413, 422, 501, 507)),
    ValueError("ours"), OSError("disk"), HubError("found out"),
], ids=lambda error: f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', '')}")
def test_what_stays_comes_through_at_once(clock, error):
    function = failing(error)
    with pytest.raises(type(error)) as caught:
        Patience(600).call("the work", function)
    assert caught.value is error and function.calls == 1 and not clock.slept


def test_attempts_end(clock):
    function = failing(*[lambda: Answered(503, "busy")] * 9)
    with pytest.raises(UnreachableError, match=r"^The work did not succeed in 6 attempts: the server answered 503 \(busy\)\."):
        Patience(600).call("the work", function)
    assert function.calls == 6 and clock.slept == [1, 2, 4, 8, 16]


def test_pauses_do_not_grow_for_ever(clock):
    Patience(6000).call("the work", failing(*[lambda: Answered(500)] * 9), attempts=10)
    assert clock.slept == [1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_each_new_attempt_is_told(clock):
    lines = []
    Patience(600, tell=lines.append).call("sending it", failing(Answered(500, "oh"), Answered(429, Retry_After="90")))
    assert lines == ["Sending it: the server answered 500 (oh). Trying again in 1.0 s.",
                     "Sending it: the server answered 429. Trying again in 1 min 31 s."]


# --- for how long -------------------------------------------------------------------------------------------------------


def test_a_pause_that_goes_past_the_end_is_not_begun(clock):
    function = failing(*[lambda: Answered(500)] * 9)
    with pytest.raises(UnreachableError, match="^The work: it was not finished in the 5.0 s that all may take. .* answered 500"):
        Patience(5).call("the work", function, attempts=9)
    assert clock.slept == [1, 2] and function.calls == 3


def test_nothing_is_begun_after_the_end(clock):
    patience, function = Patience(60), failing()
    patience.check()
    clock.now += 61
    with pytest.raises(UnreachableError, match="not finished in the 1 min 00 s"):
        patience.call("the work", function)
    assert function.calls == 0


def test_silence_ends_it_and_a_sign_of_life_does_not(clock):
    patience = Patience(3600, stall_seconds=100)
    for _ in range(5):
        clock.now += 90
        patience.check()
        patience.sign_of_life()
    clock.now += 101
    with pytest.raises(UnreachableError, match="nothing was heard from the server for 1 min 40 s"):
        patience.check()


def test_what_is_sent_again_and_again_without_an_answer_is_silence(clock):
    """A server that takes an upload and never answers: each attempt fills the buffers at once, and ends in a time-out."""
    patience = Patience(3600, stall_seconds=100)

    def upload():
        patience.asking()
        for _ in range(8):
            patience.check()
            patience.sent()
        clock.now += 30
        raise transport_error("ReadTimeout")

    with pytest.raises(UnreachableError, match="^The upload: nothing was heard from the server for 1 min 40 s"):
        patience.call("the upload", upload, attempts=50)
    assert 4 * 30 <= clock.now - 1000 - sum(clock.slept) <= 5 * 30


def test_a_slow_upload_is_no_silence(clock):
    patience = Patience(36_000, stall_seconds=100)
    patience.asking()
    for _ in range(500):
        clock.now += 20
        patience.check()
        patience.sent()


def test_silence_that_the_server_has_announced_is_none(clock):
    """The client sleeps for as long as it is told before it asks again."""
    patience = Patience(3600, stall_seconds=100)
    patience.answered(SimpleNamespace(status_code=429, headers={"retry-after": "300"}))
    clock.now += 301
    patience.check()
    clock.now += 101
    with pytest.raises(UnreachableError):
        patience.check()
    assert Patience(3600, stall_seconds=100).call("the work", failing(Answered(429, Retry_After="300"))) == "done"


def test_a_pause_longer_than_the_time_is_refused_when_it_is_asked_for(clock):
    patience = Patience(600)
    patience.answered(SimpleNamespace(status_code=429, headers={"retry-after": "500"}))
    patience.answered(SimpleNamespace(status_code=200, headers={"retry-after": "3600"}))
    with pytest.raises(UnreachableError, match="answered 429, and wants to be asked again in 1 h 00 min; .* 10 min 00 s in all"):
        patience.answered(SimpleNamespace(status_code=429, headers={"retry-after": "3600"}))


def test_a_request_never_waits_longer_than_all_of_it():
    assert Patience(3600).answer_seconds == 60 and Patience(3600, stall_seconds=20).answer_seconds == 20
    assert Patience(5).answer_seconds == 5


# --- what the server asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers, seconds", [
    ({"retry-after": "7"}, 8), ({"retry-after": " 0 "}, 1), ({"ratelimit": '"api";r=0;t=55'}, 56),
    ({"retry-after": "7", "ratelimit": '"api";r=0;t=55'}, 8), ({}, None), ({"retry-after": ""}, None),
    ({"retry-after": "soon"}, None), ({"retry-after": "-5"}, None), ({"ratelimit": '"api";r=12;t=55'}, None),
    ({"ratelimit": "nonsense"}, None),
    ({"ratelimit": '"api";r=0'}, None),
])
def test_pauses_that_are_asked_for(headers, seconds):
    assert pause_in(headers) == seconds


@pytest.mark.parametrize("ahead, seconds", [(90, 91), (-90, 1)])
def test_a_date_to_come_back_at(ahead, seconds):
    then = datetime.now(timezone.utc) + timedelta(seconds=ahead)
    for text in (format_datetime(then, usegmt=True), format_datetime(then.astimezone(timezone(timedelta(hours=9))))):
        assert asked_pause(Answered(429, Retry_After=text)) == pytest.approx(seconds, abs=2)


def test_what_is_asked_for_is_waited(clock):
    Patience(600).call("the work", failing(Answered(429, Retry_After="7"), Answered(503, ratelimit='"api";r=0;t=20')))
    assert clock.slept == [8, 21]


# --- what an error is ---------------------------------------------------------------------------------------------------


def raised_from(outer, inner, *, hidden=False):
    try:
        try:
            raise inner
        except Exception as error:
            if hidden:
                raise outer  # without "from"
            raise outer from error
    except Exception as error:
        return error


def test_the_cause_is_found_beneath_what_the_client_wraps_it_in():
    busy, denied, gone = Answered(503, "busy"), Answered(403, "not yours"), transport_error()
    assert passing_cause(raised_from(RuntimeError("Error while uploading 'it'"), busy)) is busy
    assert passing_cause(raised_from(RuntimeError("Error while uploading 'it'"), denied)) is None
    assert passing_cause(raised_from(OSError("not in the cache"), raised_from(ValueError("x"), gone))) is gone
    assert passing_cause(raised_from(RuntimeError("hidden"), gone, hidden=True)) is gone
    assert passing_cause(raised_from(denied, gone)) is None  # the outermost answer counts
    assert passing_cause(raised_from(RuntimeError("wrapped"), UnreachableError("over"))) is None


def test_our_own_error_comes_out_of_a_worker_as_it_is(clock):
    ours = UnreachableError("The time is over.")
    with pytest.raises(UnreachableError) as caught:
        Patience(600).call("the work", failing(raised_from(RuntimeError("Error while uploading 'it'"), ours)))
    assert caught.value is ours


def test_offline_is_not_waited_for(clock):
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(OfflineModeIsEnabled):
        Patience(600).call("the work", failing(OfflineModeIsEnabled("offline")))
    assert not clock.slept


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert list(chain(first)) == [first, second] and passing_cause(first) is None


@pytest.mark.parametrize("error, text", [
    (Answered(403, "Forbidden.\nmore lines"), "the server answered 403 (Forbidden)."),
    (Answered(500), "the server answered 500."),
    (ConnectionResetError(), "the connection failed (ConnectionResetError)."),
    (TimeoutError("timed out"), "timed out (TimeoutError)."),
    (raised_from(RuntimeError("Error while uploading 'it'."), Answered(507, "full")), "the server answered 507 (full)."),
    (raised_from(RuntimeError("Error while uploading 'it'."), PermissionError("no")), "no (PermissionError)."),
])
def test_errors_in_one_sentence(error, text):
    assert describe(error) == text


def test_no_secret_is_in_the_sentence():
    token = "hf_" + "a1B2" * 8
    assert token not in describe(Answered(500, f"Authorization: Bearer {token} is odd"))
    assert "X-Amz-Signature=abc" not in describe(ConnectionError("PUT http://store/x?X-Amz-Signature=abcdef0123456789"))
