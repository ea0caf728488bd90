"""Every error that ERA raises on purpose.

    EraError
    ├── BadRequest            400  the caller sent something that can't be right
    │   └── NoCode            400  a run without code in a session that stores none
    ├── Unauthorized          401  no key, or the wrong one
    ├── BadSignature          401  a delivery that isn't signed with the inbox's secret
    ├── Forbidden             403  a request that this server refuses to everybody, or to all but its operator
    ├── NotFound              404  no such session, version, run, file or route
    │   ├── NoSession         404  the caller has no session of this id
    │   ├── NoContext         404  the session has no such context
    │   └── NoProcess         404  the session has had no such process, or has forgotten it
    ├── MethodNotAllowed      405  the route exists, this method doesn't
    ├── TooSlow               408  the request did not arrive in time
    ├── Conflict              409  it exists already, or its state doesn't allow this
    │   ├── SessionDeleted    409  the session was deleted while this run was under way
    │   ├── SetupUnderWay     409  the session's packages are not installed yet
    │   ├── RunUnderWay       409  files can't be changed yet: a run has the session's turn
    │   ├── SessionLive       409  the session has processes, under which its files can't be replaced
    │   ├── BeingStopped      409  the live session is being put away, and this can't wait for that
    │   ├── TooManyProcesses  409  the session runs as many processes as it may
    │   ├── TooManyContexts   409  the session has as many contexts as it may
    │   ├── TooManyLive       409  this server has as many live sessions as it may
    │   ├── QuotaReached      409  the owner or the API key has as much as it may have
    │   ├── InputClosed       409  the process takes no input, or no more
    │   ├── TagInUse          409  a process that runs has this tag
    │   ├── KeyReused         409  the idempotency key belongs to another request
    │   └── RunLost           409  the run of this idempotency key was lost with the service
    ├── Expired               410  the session has expired and can still be restored
    ├── LinkExpired           410  the link's time is up
    ├── PreconditionFailed    412  the file isn't as If-Match or If-None-Match demands
    ├── TooLarge              413  data, code, env, files or a body over its limit
    ├── RangeNotSatisfiable   416  the requested range lies beyond the end
    ├── HeadersTooLarge       431  headers over their limit
    ├── TooManyWaiting        429  the session's queue is full
    ├── TooManyDeliveries     429  the session's inbox is full
    ├── RateReached           429  the owner or the API key has done as much as it may in this time
    ├── TooBusy               429  this server has more runs to do than it can
    ├── RelayFailed           502  the program behind a public URL gave no answer that can be sent
    │   ├── NothingListens    502  no process of the live session listens on the port
    │   └── RelayTimeout      504  it gave no answer in time
    ├── NotReady                   the server can't start like this (no answer: nobody can call it)
    └── Unavailable           503  this server can't do it now
        ├── ServiceFailed     503  the session's service ended instead of listening
        ├── TooManyUploads    503  the limit of large uploads at a time is reached
        ├── NoLanguage        503  the language isn't installed on this machine
        ├── NoIsolation       503  the requested isolation isn't available on this machine
        ├── SandboxFailed     503  a sandbox could not be made or died before the run began
        ├── NoLease           503  this host may not answer now, since it has lost touch with its cluster
        ├── HostLost          503  this host was declared dead by its cluster, and ends
        ├── SessionMoved      503  the session turned out to be at home at another host; nothing was done
        ├── HomeUnreachable   503  the host that the session is at home at can't be reached; nothing was done
        ├── HomeLost          503  that host died while it was answering
        ├── OutcomeUnknown    503  the database was cut off as it stored this: nobody knows whether it did
        └── CommitFailed      503  the run ended, but its result could not be made durable
            └── Fenced        503  since the session has another home by now

A program that fails, times out or runs out of memory is not an error: it is a run with an outcome.
"""

from __future__ import annotations

import copyreg
from typing import Any


class EraError(Exception):
    """An error that the API answers: HTTP status, a code for programs, a sentence and a hint for people.

    Subclasses set the defaults; `hint` and `code` may be given for a single error. `details` is any JSON value.
    `retry_after` is in seconds, None where trying again soon won't help.
    """

    status = 500
    code = "internal"
    hint = "This is a bug in ERA. Please report it with the request id."
    retry_after: int | None = None
    request_id = ""
    """Which request failed, where a client was told of it."""

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None, details: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.hint
        self.code = code or self.code
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of it, for a process of a pool as well, is made without `__init__`, whose parameters are others."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]  # undeclared


class BadRequest(EraError):
    status = 400
    code = "bad_request"
    hint = "See /docs for the fields of this call."


class NoCode(BadRequest):
    code = "no_code"
    hint = "Use PUT /api/sessions/{id}/code to store code"


class Unauthorized(EraError):
    status = 401
    code = "unauthorized"
    hint = "Send the header 'Authorization: Bearer KEY'."


class BadSignature(EraError):
    status = 401
    code = "bad_signature"
    hint = "Sign the body as it is sent, with the secret and the scheme that the inbox's owner has chosen."


class Forbidden(EraError):
    status = 403
    code = "forbidden"
    hint = "Set an API key (ERA_API_KEY) to serve other hosts and origins."


class NotFound(EraError):
    status = 404
    code = "not_found"
    hint = "GET /api/sessions lists the sessions there are."


class NoSession(NotFound):
    """The caller's owner has no session of this id. Whether somebody else has one, it doesn't tell."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"There is no session '{session_id}'.")
        self.session_id = session_id


class NoProcess(NotFound):
    code = "no_such_process"
    hint = "GET /api/sessions/{id}/processes lists those that run and those that ended last."


class NoContext(NotFound):
    code = "no_such_context"
    hint = "GET /api/sessions/{id}/contexts lists those that there are. A run with a new name makes one."


class MethodNotAllowed(EraError):
    status = 405
    code = "method_not_allowed"
    hint = "See /docs for the methods of this path."


class Conflict(EraError):
    status = 409
    code = "conflict"
    hint = "Choose another id, or delete the old one first."


class SessionDeleted(Conflict):
    code = "session_deleted"
    hint = "The session was deleted while this run was under way; nothing of it is kept."


class SetupUnderWay(Conflict):
    code = "setup_under_way"
    hint = "The session's setup_status tells when it has ended; a run with a longer timeout waits for that."


class RunUnderWay(Conflict):
    code = "run_under_way"
    hint = (
        "Nothing was changed. Send it again when the run has ended, or end it: GET /api/sessions/{id}/runs?limit=1 "
        "names it, DELETE /api/sessions/{id}/runs/{run_id} stops it. With wait=false this is said at once."
    )


class SessionLive(Conflict):
    code = "session_live"
    hint = (
        "Processes of the session work on its files. POST /api/sessions/{id}/stop ends them and commits what they "
        'left; then this call can be made. A rollback with "stop": true does both.'
    )


class TooManyProcesses(Conflict):
    code = "too_many_processes"
    hint = "End one first: DELETE /api/sessions/{id}/processes/{process}. Those that run are in 'details'."


class TooManyContexts(Conflict):
    code = "too_many_contexts"
    hint = "End one first: DELETE /api/sessions/{id}/contexts/{name}. Their names are in 'details'."


class BeingStopped(Conflict):
    code = "being_stopped"
    hint = "Send it again in a moment: nothing of it has been executed."
    retry_after: int | None = 1


class TooManyLive(Conflict):
    code = "too_many_live_sessions"
    hint = (
        "POST /api/sessions/{id}/stop puts a live session away; each is by itself once it has been idle for a while. "
        "Three quarters of the server's ERA_MAX_WARM may be live."
    )


class QuotaReached(Conflict):
    code = "quota_reached"
    hint = (
        "Delete or stop something of what fills it: 'details' says what that is, GET /api/quotas how much there is. "
        "The server's operator can set quotas: PATCH /api/owners/{owner}, PATCH /api/keys/{key_id}."
    )


class InputClosed(Conflict):
    code = "no_input"
    hint = 'A process takes input if it was started with "stdin": true or a "pty", until that is closed or it ends.'


class TagInUse(Conflict):
    code = "tag_in_use"
    hint = "Take another tag, or end the process that has it."


class KeyReused(Conflict):
    code = "idempotency_mismatch"
    hint = "Send the same request as before, or another Idempotency-Key."


class RunLost(Conflict):
    code = "run_lost"
    hint = "It may have run in part, but nothing of it is kept. To run it again, use another key."


class Expired(EraError):
    status = 410
    code = "expired"
    hint = "POST /api/sessions/{id}/restore brings it back; DELETE with ?purge=true drops it for good."


class LinkExpired(EraError):
    status = 410
    code = "link_expired"
    hint = "Whoever gave you the link can make another: POST /api/sessions/{id}/links."


class PreconditionFailed(EraError):
    status = 412
    code = "precondition_failed"
    hint = "Get the file again, and decide anew with the ETag of what it is now."


class TooLarge(EraError):
    status = 413
    code = "too_large"
    hint = "Keep large things in files in the working directory instead of in data."


class RangeNotSatisfiable(EraError):
    """`size` is the length of the whole content in bytes."""

    status = 416
    code = "range_not_satisfiable"
    hint = "Ask for bytes that are there, or for all by leaving the Range header out."

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


class TooSlow(EraError):
    status = 408
    code = "too_slow"
    hint = "Send the whole request at once."


class HeadersTooLarge(EraError):
    status = 431
    code = "headers_too_large"
    hint = "Shorten the URL, or send fewer or shorter headers."


class TooManyWaiting(EraError):
    status = 429
    code = "too_many_waiting"
    hint = "One run at a time per session; wait for those under way, or use more sessions."
    retry_after = 1


class TooManyDeliveries(EraError):
    status = 429
    code = "too_many_deliveries"
    hint = "Send it again later. The session's owner sees in the inbox what the others wait for."
    retry_after = 60


class RateReached(EraError):
    status = 429
    code = "rate_reached"
    hint = "Send it again after as many seconds as Retry-After says. GET /api/quotas shows the quotas and what is used."


class TooBusy(EraError):
    status = 429
    code = "too_busy"
    hint = "Send it again after as many seconds as Retry-After says."
    retry_after: int | None = 1


class RelayFailed(EraError):
    status = 502
    code = "no_answer"
    hint = "The owner of the session finds what its program said in the run that X-Era-Run names."


class NothingListens(RelayFailed):
    code = "nothing_listens"
    hint = (
        "Start a server on this port (POST /api/sessions/{id}/processes), or store code that answers "
        "(PUT /api/sessions/{id}/code)."
    )


class RelayTimeout(RelayFailed):
    status = 504
    code = "answer_timeout"


class NotReady(EraError):
    code = "not_ready"
    hint = ""


class Unavailable(EraError):
    status = 503
    code = "unavailable"
    hint = "Try again in a moment; if it stays so, look at the server's log."
    retry_after: int | None = 1
    may_have_committed = False
    """Whether what was to be stored may have been, all the same."""


class Unready(Unavailable):
    """The service can't take runs now; `details.reason` says why for programs."""

    code = "not_ready"
    hint = "Send runs elsewhere, or ask again after as many seconds as Retry-After says."
    retry_after = 2


class ServiceFailed(Unavailable):
    code = "service_failed"
    hint = "The owner of the session finds what its service said in the run that X-Era-Run names."


class TooManyUploads(Unavailable):
    code = "too_many_uploads"
    hint = "Send it again when fewer are under way. One owner may have half of those that a server takes at a time."
    retry_after = 5


class NoLanguage(Unavailable):
    code = "no_language"
    retry_after = None


class NoIsolation(Unavailable):
    code = "no_isolation"
    hint = "Run `era doctor` on the server to see what is missing."
    retry_after = None


class SandboxFailed(Unavailable):
    code = "sandbox_failed"


class CommitFailed(Unavailable):
    code = "commit_failed"
    hint = "The session is as it was before, unless `error` says that this isn't known; see the server's log."
    retry_after = None


class NoLease(Unavailable):
    code = "no_lease"
    hint = "Try again, at another host if this stays so: this one can't reach the cluster's database."


class HostLost(Unavailable):
    code = "host_lost"
    hint = "Try again, at another host: this one is being started anew."

    def __init__(self, message: str = "This host was declared dead by the others of its cluster.") -> None:
        super().__init__(message)


class SessionMoved(Unavailable):
    code = "session_moved"
    hint = "Nothing was done. Try again: the call is then passed on to the host where the session is."


class HomeUnreachable(Unavailable):
    code = "home_unreachable"
    hint = "Nothing was done. Try again: once the lease of the session's host is over, another takes the session."


class HomeLost(Unavailable):
    code = "home_lost"
    hint = (
        "What the call was to do is either done or not: look before you try again, or use an Idempotency-Key. "
        "A run that was under way is lost."
    )
    retry_after = None  # or clients would send it again by themselves


class OutcomeUnknown(Unavailable):
    code = "outcome_unknown"
    hint = "Look whether it was done, or send it again with the same Idempotency-Key."
    retry_after = None  # or clients would send it again by themselves, also without a key


class SqlUnknown(Unavailable):
    code = "sql_unknown"
    hint = "Look whether it is in the database before you send it again."
    retry_after = None  # or clients would send it again by themselves

    def __init__(self) -> None:
        super().__init__("The SQL was cut off, or the disk failed, as it was being committed: nobody knows if it was.")


class Fenced(CommitFailed):
    code = "fenced"
    hint = "Another host has taken the session meanwhile, as it was at its last commit. Nothing of this was kept."
