"""Retries of requests to buckets and networks after transient failures; errors name the location and the cure."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from upath import UPath

Answer = TypeVar("Answer")
RETRY_DELAYS = (
    0.5,
    1.0,
    2.0,
)  # seconds before each retry, jittered by up to a half, so that a thousand readers spread out
REPLACE = "copy it again, or delete it and its .idx and write it again"


class UnavailableError(Exception):
    """One of several objects requested together is unavailable; the reason is its cause."""

    def __init__(self, path: "UPath") -> None:
        self.path = path


def retry(place: object, attempt: Callable[[], Answer]) -> Answer:
    """Value of `attempt`, retried after a pause when a bucket or the network fails.

    Raises FileNotFoundError and PermissionError immediately, OSError after the last attempt, each naming the location.
    """
    import tenacity  # takes 0.1 s, spent only for URLs

    pauses = [tenacity.wait_random(0.5 * wait, 1.5 * wait) for wait in RETRY_DELAYS]
    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(len(RETRY_DELAYS) + 1),
        wait=tenacity.wait_chain(*pauses),
        retry=tenacity.retry_if_exception(_is_transient),
        reraise=True,
    )
    try:
        return tries(attempt)
    except _PROGRAMMING_ERRORS:
        raise
    except Exception as error:
        if isinstance(error, UnavailableError):
            place, error = error.path, error.__cause__
        raise _located(place, error) from error


_PERMANENT = re.compile(r"^Forbidden|not satisfiable")
_PROGRAMMING_ERRORS = (AttributeError, NotImplementedError, TypeError)  # which no retry cures


def _is_transient(error: BaseException) -> bool:
    """Whether a retry could succeed; client libraries have their own exceptions, not all of them OSErrors."""
    if not isinstance(error, Exception) or isinstance(error, _PROGRAMMING_ERRORS):
        return False
    error = error.__cause__ if isinstance(error, UnavailableError) else error
    return not isinstance(error, (FileNotFoundError, PermissionError)) and not _PERMANENT.search(_reason(error))


def _located(place: object, error: Exception) -> OSError:
    """Error to raise for a location, with what was found and the cure."""
    reason = _reason(error)
    if "not satisfiable" in reason:  # HTTP's message for a range beyond the end
        return OSError(f"{place}: the object ends before the byte range in its index; {REPLACE}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{place}: no such object; restore it, or write it again")
    if isinstance(error, PermissionError) or reason.startswith("Forbidden"):  # gcsfs reports it in words
        return PermissionError(f"{place}: permission denied ({reason}); check the credentials and their permissions")
    cure = "check network, bucket and credentials, then run the same command again"
    return OSError(f"{place}: failed {len(RETRY_DELAYS) + 1} times, the last time with: {reason}; {cure}")


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
