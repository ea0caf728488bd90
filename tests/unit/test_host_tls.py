"""What a host of a cluster is told of its certificate before it starts, and afterwards by `era doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from era.doctor import cluster_findings
from era.errors import NotReady
from era.host_tls import host_tls
from era.issuer import Issuer
from era.preflight import check_cluster
from era.settings import Settings

ISSUER, FOREIGN = Issuer("hosts"), Issuer("others")
YEAR = timedelta(days=365)


def settings(directory: Path, content: Mapping[str, bytes], **changed: Any) -> Settings:
    """Those of a host whose files have this content, by the end of the settings' names."""
    files = {}
    for name, value in content.items():
        files[f"cluster_{name}"] = directory / name
        files[f"cluster_{name}"].write_bytes(value)
    shared = {"shared_dir": directory / "shared", "data_dir": directory / "data", "cluster_secret": "s" * 32}
    return Settings(**{**shared, **files, **changed})


def files(issuer: Issuer = ISSUER, name: str = "127.0.0.1", *, calls: bool = True, lasts: timedelta = YEAR) -> Any:
    key, certificate = issuer.issue([name], lasts, calls=calls)
    return {"authority": ISSUER.certificate, "certificate": certificate, "certificate_key": key}


@pytest.mark.parametrize(
    ("content", "changed", "said"),
    [
        (files(FOREIGN), {}, "unable to get local issuer certificate"),
        (files(name="127.0.0.2"), {}, "IP address mismatch"),
        (files(name="host-1.internal"), {"host_url": "https://host-2.internal:8788"}, "Hostname mismatch"),
        (files(calls=False), {}, "purpose"),
        (files(lasts=timedelta(seconds=-1)), {}, "certificate has expired"),
        ({**files(), "certificate_key": files()["certificate_key"]}, {}, "KEY_VALUES_MISMATCH"),
        ({**files(), "certificate": b"none"}, {}, "ERA_CLUSTER_CERTIFICATE and its key can't be used"),
        ({**files(), "authority": b"none"}, {}, "ERA_CLUSTER_AUTHORITY has no certificate"),
        ({"certificate": b""}, {}, "ERA_CLUSTER_CERTIFICATE_KEY and ERA_CLUSTER_AUTHORITY, too"),
        (files(), {"cluster_authority": Path("/nowhere")}, "ERA_CLUSTER_AUTHORITY can't be read"),
        (files(), {"host_url": "http://127.0.0.1:8788"}, "ERA_HOST_URL is plain"),
        (files(), {"host_url": "https://host..internal:8788"}, "is no name of a host"),
        (files(), {"shared_dir": None, "cluster_secret": None}, "ERA_SHARED_DIR"),
        ({}, {"cluster_port": 8788}, "ERA_CLUSTER_CERTIFICATE, too"),
    ],
)
def test_a_certificate_that_the_others_would_refuse(
    tmp_path: Path, content: Mapping[str, bytes], changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(NotReady, match=said) as problem:
        check_cluster(settings(tmp_path, content, **changed))
    assert "\n" not in problem.value.message
    assert not problem.value.hint


def test_a_key_that_tls_has_no_signatures_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ec, "SECP256R1", ec.SECP256K1)
        content = files()
    with pytest.raises(NotReady, match="Other hosts wouldn't take ERA_CLUSTER_CERTIFICATE"):
        check_cluster(settings(tmp_path, content))


def test_a_certificate_for_the_name_at_which_the_others_call(tmp_path: Path) -> None:
    named = settings(tmp_path, files(name="host-1.internal"), host_url="https://host-1.internal:8788")
    check_cluster(named)
    tls = host_tls(named)
    assert tls is not None
    assert tls.names == ("host-1.internal",)
    assert host_tls(Settings()) is None


def test_the_doctor_says_until_when_a_certificate_is_good(tmp_path: Path) -> None:
    (finding,) = cluster_findings(settings(tmp_path, files()))
    assert finding.there
    assert "127.0.0.1" in finding.text
    for lasts in (timedelta(days=13), timedelta(seconds=-1)):
        (finding,) = cluster_findings(settings(tmp_path, files(lasts=lasts)))
        assert not finding.there
        assert finding.remedy
    assert not list(cluster_findings(Settings()))
