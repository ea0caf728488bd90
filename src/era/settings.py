"""Every knob of the service: name, default, help. Each is `ERA_NAME` in the environment, and the commonest are options
of `era serve` too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The service's settings. docs/settings.md shows them to users, and a test compares the two."""

    model_config = SettingsConfigDict(env_prefix="ERA_", env_ignore_empty=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="Address to serve on. Any but loopback needs an API key.")
    port: int = Field(default=8787, ge=0, le=65535, description="Port to serve on; 0 lets the system choose one.")
    data_dir: Path = Field(default=Path("data"), description="Where sessions, files and the database lie.")
    blobs: str = Field(
        default="",
        description="Where the content of files lies: s3://BUCKET/PREFIX?endpoint=URL&region=NAME, with credentials in "
        "AWS_* variables. Empty: in the data directory.",
    )
    blob_cache_mb: int = Field(
        default=1024, ge=1, description="Disk space for what was fetched from the blob store, in MiB, if that is S3."
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The operator's key: callers of /api and /mcp must send it, or one made with it, as bearer token.",
    )
    allow_no_key: bool = Field(
        default=False, description="Serve an address other than loopback although no API key is set."
    )
    public_url: str | None = Field(
        default=None, description="URL under which others reach this server, if not the one that a caller uses."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe messages to log: debug, info, warning or error."
    )

    isolation: Literal["auto", "gvisor", "bubblewrap"] = Field(
        default="auto",
        description="Which sandbox a session gets that doesn't say: auto is the strongest that works here.",
    )
    memory_mb: int = Field(default=512, ge=64, description="Memory of one sandbox in MiB.")
    cpus: float = Field(default=1.0, ge=0.05, description="Processors one sandbox may use.")
    pids: int = Field(default=256, ge=16, description="Processes and threads one sandbox may have at a time.")
    tmp_mb: int = Field(default=64, ge=1, description="Size of /tmp and of /dev/shm in a sandbox, in MiB each.")
    disk_mb: int = Field(default=4096, ge=1, description="Size of all files of a session, in MiB.")
    files: int = Field(default=200_000, ge=16, description="Files, directories and links a session may have.")
    disk_write_mbps: int = Field(
        default=64,
        ge=0,
        description="MiB a second that a sandbox may write to disk, where a cgroup can bound that; 0: any.",
    )
    output_bytes: int = Field(
        default=10 << 20, ge=1024, description="Bytes of stdout, and of stderr, that a run may answer."
    )
    max_memory_mb: int = Field(default=2048, ge=64, description="Most memory that a session may ask for, in MiB.")
    max_cpus: float = Field(default=4.0, ge=0.05, description="Most processors that a session may ask for.")
    max_pids: int = Field(default=1024, ge=16, description="Most processes and threads that a session may ask for.")
    max_disk_mb: int = Field(default=16_384, ge=1, description="Most disk that a session may ask for, in MiB.")
    max_files: int = Field(default=500_000, ge=16, description="Most files that a session may ask for.")
    max_output_bytes: int = Field(
        default=64 << 20, ge=1024, description="Most bytes of stdout, and of stderr, that a session may ask for."
    )
    max_timeout: float = Field(
        default=3600, gt=0, description="Longest timeout that a run or a session may ask for, in seconds."
    )
    max_waiting: int = Field(
        default=64, ge=1, description="Runs that may wait for a session's turn before more get a 429."
    )

    versions_kept: int = Field(
        default=100, ge=1, description="Versions of a session that are kept, the current one included."
    )
    outputs_kept: int = Field(
        default=100, ge=0, description="Newest runs of a session whose whole output is kept; 0 keeps none."
    )
    runs_kept: int = Field(default=10_000, ge=1, description="Newest runs of a session whose records are kept.")
    grace_seconds: float = Field(
        default=86_400, ge=0, description="Seconds that a session can be restored after it expired or was deleted."
    )

    storage_mb: int = Field(
        default=4096, ge=1, description="Size of all that is in storage (kv, r2 and d1 together), in MiB."
    )
    storage_database_mb: int = Field(
        default=256, ge=1, description="Size of one namespace's SQL database in storage, in MiB."
    )

    egress_private: str = Field(
        default="",
        description="Private ranges that programs with internet access may reach, as 10.1.0.0/16,192.168.7.0/24. Never "
        "this machine itself.",
    )

    setup_seconds: float = Field(
        default=600, gt=0, description="Seconds that installing a session's packages may take."
    )

    body_idle_seconds: float = Field(
        default=30,
        gt=0,
        description="Seconds for which nothing of a request's body may come before the request gets a 408.",
    )
    max_uploads: int = Field(
        default=32,
        ge=1,
        description="Bodies of over 1 MiB, archives and capsules that may come in at a time before more get a 503.",
    )
    import_mb: int = Field(default=4096, ge=1, description="Size of the largest capsule that may be imported, in MiB.")

    spares: int = Field(default=1, ge=0, description="Sandboxes kept ready for first runs, for each language.")
    max_warm: int = Field(
        default=32,
        ge=1,
        validation_alias=AliasChoices("max_warm", "ERA_MAX_WARM", "ERA_MAX_LIVE"),
        description="Sandboxes that may belong to sessions at a time; ERA_MAX_LIVE is its older name.",
    )
    idle_seconds: float = Field(
        default=300, gt=0, description="Seconds after its last run that a session keeps its sandbox."
    )
    drain_seconds: float = Field(
        default=10, ge=0, description="Seconds that runs under way may take when the service stops."
    )
