"""`era cluster`, and what a host of a cluster is refused; what a cluster does is in tests/api/test_cluster.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from era.errors import NotReady
from era.preflight import check_cluster
from era.settings import Settings
from tests.client.command import era

SECRET = "a secret of thirty-two characters"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cluster_secret": SECRET}, "ERA_SHARED_DIR"),
        ({"shared_dir": "shared"}, "ERA_CLUSTER_SECRET"),
        ({"shared_dir": "data", "cluster_secret": SECRET}, "ERA_DATA_DIR"),
        ({"shared_dir": "shared", "cluster_secret": SECRET, "host": "0.0.0.0"}, "ERA_HOST_URL"),
    ],
)
def test_a_host_that_the_others_could_not_use(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(NotReady, match=said):
        check_cluster(Settings(**{"data_dir": Path("data"), **settings}))
    check_cluster(Settings())


def test_what_cannot_be_started_or_stopped(tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path))
    assert "No cluster runs in" in era(None, "cluster", "down", *where, code=2).stderr
    assert "--hosts" in era(None, "cluster", "up", *where, "--hosts", "0", code=2).stderr
    (tmp_path / "cluster.json").write_text(json.dumps({"pid": os.getpid(), "hosts": []}))
    assert f"by process {os.getpid()}" in era(None, "cluster", "up", *where, code=2).stderr
