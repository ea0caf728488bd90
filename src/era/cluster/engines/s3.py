"""An S3 server on this machine: Ceph's radosgw, which can run alone on a database file."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from era.cluster.engines.process import LOOPBACK, ServerProcess, check_port, free_port, kept, listens
from era.errors import NotReady

MISSING = "there is no radosgw here: apt-get install radosgw"
REGION = "us-east-1"
START_SECONDS = 120.0
_BUCKET = "era"


def is_there() -> bool:
    return shutil.which("radosgw") is not None and shutil.which("radosgw-admin") is not None


class Server:
    """A server and its data, with one user."""

    def __init__(self, data: Path, log: Path) -> None:
        self._data = data
        self._process = ServerProcess("radosgw", log)

    @property
    def has_ended(self) -> bool:
        return self._process.has_ended

    def initialise(self, *options: str) -> tuple[str, str]:
        """Make its data and a user, with these options of radosgw-admin; returns the user's access key and secret key.
        Raises NotReady."""
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(mode=0o700)
        user = ["radosgw-admin", *self._options(), "user", "create", "--uid=era", "--display-name=era", *options]
        with tempfile.TemporaryFile("w+") as errors:
            if (printed := _json_printed(["setpriv", "--pdeathsig", "KILL", *user], errors)) is None:
                errors.seek(0)
                raise NotReady(f"radosgw-admin can't make a user: {' '.join(errors.read().split())[-1000:]}")
        (key,) = printed["keys"]
        return key["access_key"], key["secret_key"]

    def start(self, address: str, port: int, prefix: Sequence[str] = ()) -> None:
        """Start it, and wait until it answers. See ServerProcess."""
        command = ["radosgw", "-f", *self._options()]
        command.append(f"--rgw-frontends=beast endpoint={address}:{port} tcp_nodelay=1")
        self._process.start(command, lambda: listens(address, port), START_SECONDS, prefix=prefix)

    def stop(self, number: int = signal.SIGKILL) -> None:
        self._process.stop(number, START_SECONDS)

    def _options(self) -> list[str]:
        return [
            "--no-mon-config",
            "--conf=/dev/null",
            "--rgw-backend-store=dbstore",
            "--rgw-config-store=dbstore",
            f"--dbstore-config-uri=file:{self._data}/config.db",
            f"--dbstore-db-dir={self._data}",
            f"--rgw-data={self._data}",
            f"--run-dir={self._data}",
            f"--log-file={self._data}/log",
        ]


def _json_printed(command: Sequence[str], errors: IO[str]) -> Any:
    """The JSON object that radosgw-admin prints; None where it ends without, or takes too long. It isn't waited for any
    longer: when all is stored and said, it now and then hangs."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as admin:
        killing = threading.Timer(START_SECONDS, admin.kill)
        killing.start()
        try:
            printed = ""
            for line in admin.stdout or ():
                printed += line
                if line == "}\n":
                    return json.loads(printed)
            return None
        finally:
            killing.cancel()
            admin.kill()


def bucket(name: str, prefix: str | None, endpoint: str, access_key: str, secret_key: str) -> S3Store:
    """A bucket of such a server."""
    return S3Store(
        name,
        prefix=prefix,
        endpoint=endpoint,
        region=REGION,
        access_key_id=access_key,
        secret_access_key=secret_key,
        client_options={"allow_http": True},
    )


def make_bucket(bucket: S3Store) -> None:
    # A put of the name "" makes the bucket. The answer has no ETag, which the library then misses.
    with suppress(BaseError):
        obstore.put(bucket, "", b"", use_multipart=False)


def blobs_url(bucket: str, prefix: str, endpoint: str) -> str:
    """That bucket, as ERA_BLOBS names it."""
    return f"s3://{bucket}/{prefix}?endpoint={endpoint}&region={REGION}"


class S3:
    """Where a cluster for trying has the content of files: at a port of loopback, by keys."""

    name = "s3"
    keeps_hosts = False

    def __init__(self, directory: Path) -> None:
        """`directory` has its data, its log and its keys."""
        self._directory = directory
        self._server = Server(directory / "data", directory / "log")

    @property
    def has_ended(self) -> bool:
        return self._server.has_ended

    def start(self) -> str:
        """Start it, and return where it is, for people. Raises NotReady, OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)

        def make() -> dict[str, str | int]:
            access_key, secret_key = self._server.initialise()
            return {"port": free_port(), "access_key": access_key, "secret_key": secret_key}

        self._keys = kept(self._directory / "keys.json", make)
        port = self._keys["port"]
        check_port(port, self._directory, "S3")
        self._server.start(LOOPBACK, port)
        self._endpoint = f"http://{LOOPBACK}:{port}"
        make_bucket(bucket(_BUCKET, None, self._endpoint, self._keys["access_key"], self._keys["secret_key"]))
        return f"{LOOPBACK}:{port}"

    def settings(self) -> dict[str, str]:
        """Those of hosts that use it, once it is started."""
        return {
            "ERA_BLOBS": blobs_url(_BUCKET, "blobs", self._endpoint),
            "AWS_ACCESS_KEY_ID": self._keys["access_key"],
            "AWS_SECRET_ACCESS_KEY": self._keys["secret_key"],
        }

    def stop(self) -> None:
        self._server.stop(signal.SIGTERM)
