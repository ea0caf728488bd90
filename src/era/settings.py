"""The settings of the service: name, default, description. Each is the variable `ERA_NAME`; the most common ones are
options of `era serve`, too."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_LONGEST_SECONDS = 100 * 366 * 86_400
_MOST = 1 << 40
"""Of anything that is counted: as MiB it still is a number of bytes that fits into 64 bits, four times over."""


def _fits_in_a_header(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if text != text.strip() or any(unicodedata.category(each) == "Cc" for each in text):
        raise ValueError("a key can't have line breaks or other control characters, nor spaces at its ends")
    return key


class Settings(BaseSettings):
    """The service's settings. docs/settings.md shows them to users, and a test compares the two."""

    model_config = SettingsConfigDict(
        env_prefix="ERA_", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    host: str = Field(
        default="127.0.0.1", description="Address to listen on. An address other than loopback needs an API key."
    )
    port: int = Field(default=8787, ge=0, le=65535, description="Port to listen on; 0: the system chooses one.")
    data_dir: Path = Field(default=Path("data"), description="Directory of the database and the files of sessions.")
    database_url: SecretStr | None = Field(
        default=None,
        description="Database of PostgreSQL for all rows: postgresql://USER:PASSWORD@HOST:5432/DATABASE. Left out: an "
        "SQLite file in the data directory.",
    )
    blobs: str = Field(
        default="",
        description="Where the content of files is stored: s3://BUCKET/PREFIX?endpoint=URL&region=NAME, with "
        "credentials in AWS_* variables. Empty: in the data directory.",
    )
    blob_cache_mb: int = Field(
        default=1024, ge=1, description="Size of the local cache of content from S3, in MiB. Only if blobs are in S3."
    )
    api_key: Annotated[SecretStr, AfterValidator(_fits_in_a_header)] | None = Field(
        default=None,
        description="The operator's key. Callers of /api must send it, or a key made with it, as bearer token.",
    )
    allow_no_key: bool = Field(
        default=False, description="Allow listening on an address other than loopback without an API key."
    )
    public_url: str | None = Field(
        default=None,
        description="URL by which clients reach this server. Left out: the one that a caller uses, if that is an "
        "address of this server's own, or the address that it listens on.",
    )
    public_host: str | None = Field(
        default=None,
        pattern=r"^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z0-9-]*[a-z0-9](:[0-9]{1,5})?$",
        description="Host name below which sessions have sites for others; needs a wildcard in DNS and a TLS proxy.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe messages to log: debug, info, warning or error."
    )

    log_format: Literal["console", "json"] = Field(
        default="console", description="How to log: console, lines for people; json, an object a line."
    )
    shared_dir: Path | None = Field(
        default=None,
        description="Makes this server a host of a cluster: the directory that all its hosts share, with the files of "
        "sessions and, unless it is in PostgreSQL, the database. Left out: a single server, which has no part in one.",
    )
    cluster_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="Secret by which the hosts of a cluster know each other, the same for all; at least 32 characters.",
    )
    host_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/?#@\s]+/?$",
        description="URL at which the other hosts of the cluster reach this one. Left out: the address that it listens "
        "on.",
    )
    cluster_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port at which the other hosts of the cluster reach this one over TLS; 0: the system chooses one. "
        "Only with ERA_CLUSTER_CERTIFICATE.",
    )
    cluster_certificate: Path | None = Field(
        default=None,
        description="Has the hosts of the cluster talk over TLS: a file with this host's certificate in PEM, for the "
        "address at which the others reach it, and those between it and the authority. Left out: hosts talk plain.",
    )
    cluster_certificate_key: Path | None = Field(
        default=None, description="File with the key of ERA_CLUSTER_CERTIFICATE, in PEM and without a password."
    )
    cluster_authority: Path | None = Field(
        default=None,
        description="File with the certificate, in PEM, of the authority that signs those of hosts and of nobody else.",
    )
    lease_seconds: float = Field(
        default=5,
        ge=0.5,
        le=300,
        description="Seconds without a heartbeat after which a host of a cluster counts as dead, and the others may "
        "take its sessions.",
    )

    traces: str = Field(
        default="",
        pattern=r"^(https?://\S+)?$",
        description="Where to send traces: the URL of an OpenTelemetry collector's OTLP over HTTP, such as "
        "http://127.0.0.1:4318/v1/traces. Needs the extra `traces`. Empty: nowhere.",
    )
    trace_programs: bool = Field(
        default=False, description="Give programs of runs the variable TRACEPARENT. Only with ERA_TRACES."
    )

    isolation: Literal["auto", "gvisor", "bubblewrap"] = Field(
        default="auto",
        description="Sandbox of sessions that choose none; auto is the strongest that works on this machine.",
    )
    cgroup_parent: str = Field(
        default="",
        pattern=r"^(self|(/[^/.][^/]*)+)?$",
        description="Control group below which those of sandboxes are made, as a path from the root of each hierarchy, "
        "such as /era.slice; self: the one that ERA is in. It must be there. Left out: ERA chooses.",
    )
    memory_mb: int = Field(default=512, ge=64, description="Memory of a sandbox, in MiB.")
    cpus: float = Field(default=1.0, ge=0.05, description="Processors of a sandbox.")
    pids: int = Field(default=256, ge=16, description="Processes and threads of a sandbox at a time.")
    disk_mb: int = Field(default=4096, ge=1, description="Size of all files of a session, in MiB.")
    files: int = Field(default=200_000, ge=16, description="Files, directories and links of a session.")
    disk_write_mbps: int = Field(
        default=64,
        ge=0,
        description="MiB per second that a sandbox may write to disk, where cgroups can limit that; 0: no limit.",
    )
    max_limits: str = Field(
        default="",
        description="Limits that a session may ask for at most, by their names in the API, such as "
        "memory_mb=2048,cpus=4. Of a limit that isn't named: four times the default.",
    )
    max_timeout: float = Field(
        default=3600, gt=0, description="Longest timeout that a run or a session may ask for, in seconds."
    )

    versions_kept: int = Field(
        default=100, ge=1, description="Versions that are kept of a session, including the current one."
    )
    history_mb: int = Field(
        default=0,
        ge=0,
        description="Size of all that the kept versions of a session hold together, in MiB; the oldest without a name "
        "go first. 0: four times the session's own disk space.",
    )
    outputs_kept: int = Field(
        default=100, ge=0, description="Runs of a session, the newest, whose complete output is kept; 0: none."
    )
    grace_seconds: float = Field(
        default=86_400,
        ge=0,
        description="Seconds for which a session can be restored after it has expired or was deleted.",
    )

    storage_mb: int = Field(
        default=4096, ge=1, description="Size of everything in storage (kv, r2 and d1 together), in MiB."
    )
    quotas: str = Field(
        default="",
        description="Quotas of owners for whom nothing else was set, by their names in the API, such as "
        "sessions=100,disk_mb=10000. Of a quota that isn't named, or is 0: no bound.",
    )

    egress_private: str = Field(
        default="",
        description="Private address ranges that programs with internet access may reach, such as "
        "10.1.0.0/16,192.168.7.0/24. Neither this machine nor what it works with is ever reachable.",
    )

    egress_refused: str = Field(
        default="",
        description="Addresses and ranges that programs never reach, besides those that are refused anyway, such as "
        "203.0.113.7,198.51.100.0/24.",
    )

    setup_seconds: float = Field(
        default=600, gt=0, description="Seconds that the setup of a session (installing packages) may take."
    )

    spares: int = Field(
        default=1, ge=0, description="Sandboxes kept ready for the first runs of sessions, for each language."
    )
    max_warm: int | None = Field(
        default=None,
        ge=1,
        description="Sandboxes of sessions at a time, kept between runs. Left out: as many as half of the available "
        "memory has room for. Three quarters of them may be of live sessions.",
    )
    idle_seconds: float = Field(
        default=300,
        ge=0.1,
        description="Seconds for which a session keeps its sandbox after its last run, and stays live without a "
        "running process, an attached client or a call.",
    )
    unready_seconds: float = Field(
        default=0,
        ge=0,
        description="Seconds for which the service, told to stop, goes on as before while /ready answers 503, so that "
        "load balancers notice.",
    )
    drain_seconds: float = Field(
        default=10, ge=0, description="Seconds that runs under way may take when the service stops."
    )

    @field_validator("*")
    @classmethod
    def _can_be_reckoned_with(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what would fail only later, as a number of microseconds or bytes."""
        most = _LONGEST_SECONDS if isinstance(value, float) else _MOST
        if isinstance(value, int | float) and value > most and info.field_name != "max_timeout":
            raise ValueError(f"must be at most {most}")
        return value
