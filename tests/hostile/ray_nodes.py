"""The machines that Ray's autoscaler makes in a test: nodes of Ray on this machine, each with a directory for its host.

Imported by Ray's own process only, as the provider of the cluster's machines.
"""

from __future__ import annotations

import os
from typing import Any

from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Nodes(FakeMultiNodeProvider):  # type: ignore[misc]  # see pyproject.toml
    """A provider whose nodes are processes, with what tells them apart in their environment."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._gcs_address = f"{get_node_ip_address()}:{provider_config['port']}"

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            os.environ["ERA_DATA_DIR"] = f"{self.provider_config['directory']}/node-{self._next_node_id + 1}"
            super()._create_node_with_resources_and_labels(*arguments)
