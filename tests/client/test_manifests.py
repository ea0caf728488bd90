"""The documents' units for systemd and their example for KubeRay, as systemd, a shell and Ray read them: there is no
Kubernetes to try it on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types of its own

ROOT = Path(__file__).parent.parent.parent
RAY = ROOT / ".tools" / "ray"
DOCS = ROOT / "docs"


def manifest() -> dict[str, Any]:
    [text] = re.findall(r"```yaml\n(apiVersion: ray.io.*?)```", (DOCS / "cluster.md").read_text(), re.DOTALL)
    [cluster, service] = yaml.safe_load_all(text)
    spec = cluster["spec"]["workerGroupSpecs"][0]
    assert service["spec"]["selector"] == {
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/group": spec["groupName"],
    }
    return cast(dict[str, Any], cluster)


@pytest.mark.parametrize("group", ["head", "hosts"])
def test_ray_is_started_as_kuberay_says(tmp_path: Path, group: str) -> None:
    """Whose commands have quotes in them (KUBERAY_GEN_RAY_START_CMD)."""
    spec = manifest()["spec"]
    [container] = (spec["headGroupSpec"] if group == "head" else spec["workerGroupSpecs"][0])["template"]["spec"][
        "containers"
    ]
    for name in ("ray", "era"):
        program = f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(["{name}", *sys.argv[1:]]))\n'
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    generated = "ray start  --block  --labels=era=yes  --resources='{\"era_host\":1}' "
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBERAY_GEN_RAY_START_CMD": generated},
        capture_output=True,
        text=True,
        check=True,
    )
    called = {words[0]: words[1:] for words in map(json.loads, done.stdout.splitlines())}
    assert called["ray"] == ["start", "--block", "--labels=era=yes", '--resources={"era_host":1}']
    if group == "head":
        assert called["era"][:4] == ["serve", "--cluster", "auto", "--label"]


@pytest.mark.soak
def test_rays_autoscaler_reads_it() -> None:
    if not RAY.is_dir():
        pytest.skip("there is no Ray here: scripts/setup --soak")
    program = (
        "import json, sys; from ray.autoscaler._private.kuberay import autoscaling_config as config; "
        "print(json.dumps(config._derive_autoscaling_config_from_ray_cr(json.load(sys.stdin))))"
    )
    resource = manifest()
    resource["metadata"]["namespace"] = "default"  # as Kubernetes adds it
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(resource),
        env={**os.environ, "PYTHONPATH": str(RAY)},
        capture_output=True,
        text=True,
        check=True,
    )
    config = json.loads(done.stdout)
    hosts = config["available_node_types"]["hosts"]
    assert hosts["resources"] == {"CPU": 0, "era_host": 1}
    assert hosts["labels"] == {"era": "yes"}
    assert (hosts["min_workers"], hosts["max_workers"]) == (1, 10)
    assert config["idle_timeout_minutes"] == 1.0


@pytest.mark.parametrize(("page", "count"), [("deployment.md", 1), ("cluster.md", 2)])
def test_systemd_knows_all_that_units_say(tmp_path: Path, page: str, count: int) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    units = re.findall(r"```ini\n(\[Unit\].*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(units) == count
    for number, text in enumerate(units):
        unit = tmp_path / f"era-{number}.service"
        there, replaced = re.subn(r"/opt/era/\.venv/bin/(era|ray) ", "/bin/true ", text)
        unit.write_text(there)
        assert replaced == 1
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=120)
        said = [line for line in (done.stdout + done.stderr).splitlines() if str(tmp_path) in line or unit.name in line]
        assert (done.returncode, said) == (0, [])
