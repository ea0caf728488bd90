"""What somebody tries who knows another service, and the call of this API that does it.

Names that are nearly right are `era.common.spelling`'s. These are right somewhere else, or a plausible guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from era.common.spelling import nearest

_SESSION = "/api/sessions/{id}"
_RUN = (
    f"POST {_SESSION}/run runs 'code', or a line of shell as 'command'; POST {_SESSION}/processes starts what goes on."
)
_ONCE = (
    'POST /api/execute runs a program once: {"language", "code"}, also "stdin", "args", and "files" as {name: text}.'
)
_COPY = f"POST {_SESSION}/duplicate copies a session, with its files and data."
_PUT = f"PUT {_SESSION}/files/{{path}} with the content as the body puts a file, PUT {_SESSION}/archive a tar or zip."
_GET = f"GET {_SESSION}/files lists files, GET {_SESSION}/files/{{path}} gets one, GET {_SESSION}/archive all of them."
_PACKAGES = (
    'Packages are in a session\'s \'setup\': {"pip": ["pandas"], "npm": ["axios"]}. Programs can install some, too.'
)
_VARIABLES = "Variables of one run are its 'env'; those of every run of a session are in its 'setup': {\"envs\": {…}}."
_PORT = f"Nothing has to be opened: GET {_SESSION}/host?port=P gives the public URL of any port."
_CLOCK = "The server starts nothing at a time of day; cron and the like can ask for a run: docs/runs.md."

type Hints = dict[str, str]
"""Hints by the name that somebody used."""


def _hints(*groups: tuple[str, str]) -> Hints:
    return {name: hint for names, hint in groups for name in names.split()}


_BELOW_A_SESSION = _hints(
    ("exec execute eval command commands cmd shell process", _RUN),
    ("fork clone copy branch", _COPY),
    ("snapshot snapshots save", f"Each run that changes something makes one of GET {_SESSION}/versions. {_COPY}"),
    ("upload uploads write", _PUT),
    ("download downloads read ls list fs filesystem", _GET),
    ("artifacts artifact", f"A run's answer and its record name its 'artifacts', which are files. {_GET}"),
    (
        "logs log output",
        f"GET {_SESSION}/runs lists runs, GET {_SESSION}/runs/{{run_id}}/stdout gets what one wrote; processes have "
        f"{_SESSION}/processes/{{process}}/events.",
    ),
    (
        "kill terminate pause resume start restart shutdown close",
        f"POST {_SESSION}/stop ends a session's processes, DELETE {_SESSION} deletes it. An idle one takes no memory "
        "and needs neither pause nor start.",
    ),
    ("cancel abort interrupt", f"DELETE {_SESSION}/runs/{{run_id}} stops a run."),
    (
        "data state variables",
        f"GET {_SESSION} has 'data', and PATCH {_SESSION} replaces it. Variables that stay are those of runs with a "
        "'context'.",
    ),
    ("env envs secrets", f"{_VARIABLES} What is secret goes into a run's 'secrets'."),
    ("packages package install pip npm dependencies requirements", f"{_PACKAGES} PATCH {_SESSION} changes it."),
    ("proxy url urls port ports preview", _PORT),
    ("timeout keepalive keep_alive extend refresh", f"PATCH {_SESSION} changes 'default_timeout' and 'ttl'."),
    ("notebook notebooks kernel kernels cell cells", "A run with a 'context' is a notebook's cell: docs/contexts.md."),
    ("history", f"GET {_SESSION}/runs lists runs, GET {_SESSION}/versions what they left."),
    ("git", f'POST {_SESSION}/run {{"command": "git clone …"}}: git is a program like others.'),
    ("webhook webhooks hooks", "Public URLs and inboxes take webhooks: docs/public-urls.md, docs/inbox.md."),
    ("schedule schedules cron", _CLOCK),
    ("pty tty terminals ssh", f"GET {_SESSION}/terminal is a WebSocket to a shell."),
)
_AT_THE_TOP = _hints(
    (
        "sandbox sandboxes vm vms container containers machine machines workspace workspaces",
        "What is a sandbox elsewhere is a session here: POST /api/sessions makes one. docs/coming-from.md has what is "
        "called how.",
    ),
    ("execute exec run submissions jobs piston", f"{_ONCE} In a session it is POST {_SESSION}/run."),
    ("runtimes", "GET /api/languages lists the languages of this server."),
    ("files", _PUT),
    ("kv d1 r2", "It is /api/storage/kv, /api/storage/d1 and /api/storage/r2: docs/program-storage.md."),
)

_OF_SESSIONS = _hints(
    ("env envs envvars environment environmentvariables variables", _VARIABLES),
    (
        "image template templateid dockerfile dockerimage snapshot",
        "There are no images. A session's 'setup' has its packages and commands: docs/packages.md.",
    ),
    ("name title alias label labels tags", "A session's name is its 'session_id'; labels go into 'metadata'."),
    ("port ports", _PORT),
    ("code script command cmd", f"PUT {_SESSION}/code stores code. {_RUN}"),
    ("files file", _PUT),
    ("language lang", "A session keeps the language it was made with. POST /api/execute runs any."),
    ("schedule cron", _CLOCK),
    ("secrets secret", "What is secret goes into the 'secrets' of each run or process: docs/secrets.md."),
)
_OF_COPIES = _hints(("sessionid name target", "The copy's id is the 'new_id'."))
_OF_SQL = _hints(
    ("query statement", "The statement is the 'sql'."),
    ("parameters args arguments values bindings", "Values for the statement are its 'params'."),
)
_OF_RUNS = _hints(
    ("stream streaming", f"POST {_SESSION}/stream, with the same body, answers with events as the program writes."),
    ("async detach detached wait", "'background': true answers at once; GET …/runs/{run_id} follows the run."),
    (
        "language lang",
        "A session keeps the language it was made with. POST /api/execute runs any, a 'command' what is installed.",
    ),
    ("version runtime", f"A server has one version of each language: GET /api/languages. {_ONCE}"),
    ("cmd shell bash exec", "A line of shell is the 'command'."),
    ("source script program content", "The program is the 'code'; a line of shell is the 'command'."),
    ("input", "Standard input is 'stdin'."),
    ("argv arguments", "Arguments are 'args'."),
    ("workdir workingdir workingdirectory", "It is 'cwd', a directory below the session's own."),
    ("files file", f"{_PUT} POST /api/execute takes 'files' as {{name: text}}."),
    ("updatedata", f"Programs change data in .session_data.json, and PATCH {_SESSION} replaces it."),
)
_OF_BOTH = _hints(
    ("packages package dependencies requirements pip npm libraries", _PACKAGES),
    (
        "memory memorymb memorymib memorylimit runmemorylimit cpu cpus cpucount disk diskmb resources",
        'It is one of a session\'s \'limits\': {"memory_mb", "cpus", "pids", "disk_mb"}.',
    ),
    ("network internet networkmode", "'allowInternetAccess' is whether programs connect, and 'egress' where to."),
)
_OTHER_UNITS = ("timeoutms", "timeoutmillis", "timeoutseconds", "runtimeout", "compiletimeout")


def session_path_hint(path: str) -> str | None:
    """What does what somebody wanted who called a path of a session, or a method of it, that there isn't."""
    words = path.lower().strip("/").split("/")
    if words[:2] != ["api", "sessions"] or len(words) < 4:
        return None
    return f"{_PUT} {_GET}" if words[3] == "files" else _BELOW_A_SESSION.get(words[3])


def path_hint(path: str) -> str | None:
    """The same for paths that don't begin with those of a session."""
    words = [word for word in path.lower().strip("/").split("/") if word != "api" and not re.fullmatch(r"v\d", word)]
    return _AT_THE_TOP.get(words[0]) if words else None


def field_hint(name: str, known: Collection[str]) -> str | None:
    """Where a field belongs that a call for sessions or runs doesn't have. None if that is unknown, or if it is one of
    `known`, misspelt."""
    plain = re.sub(r"[_.\s-]", "", name).lower()
    if plain in _OTHER_UNITS:
        found = next((each for each in ("timeout", "default_timeout") if each in known), None)
        return f"It is '{found}' here, in seconds." if found else None
    hints: Hints = {}
    if "command" in known:
        hints = _OF_RUNS | _OF_BOTH
    elif "default_timeout" in known:
        hints = _OF_SESSIONS | _OF_BOTH
    elif "new_id" in known:
        hints = _OF_COPIES
    elif "sql" in known:
        hints = _OF_SQL
    meant = nearest(name, known)
    is_misspelt = meant is not None and name not in meant.split("_")  # `code` isn't, though there is `record_code`
    return None if plain not in hints or is_misspelt else hints[plain]
