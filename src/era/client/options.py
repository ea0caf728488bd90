"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

DEFAULT_SERVER = "http://127.0.0.1:8787"

type Server = Annotated[str, Parameter(env_var="ERA_SERVER")]
