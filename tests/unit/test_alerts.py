"""Alert rules and the dashboard of docs/monitoring: they use metrics that there are, and alerts fire for their reasons.

The expressions of rules are read here as far as the rules use Prometheus' language: selectors, `increase()`, a ratio
and a comparison. `increase()` is what a counter has grown by between two looks at it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import operator
import os
import re
import resource
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import yaml  # type: ignore[import-untyped]  # it has no types of its own
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from era.core.cluster.homes import Homes
from era.core.models import StoredCode, now
from era.core.operation.garbage import collect_once
from era.core.operation.readiness import Readiness
from era.core.pool.admission import Admission
from era.core.public.inbox import Content
from era.core.telemetry import RequestEnded
from era.core.trees.pins import Pins
from era.core.trees.snapshots import Snapshots
from era.errors import CommitFailed, SandboxFailed, TooBusy
from era.operation.server_data import LocalContent
from era.store.metadata import SqlStore
from era.telemetry.gauges import MeasuredParts, metrics_text
from era.telemetry.metrics import Metrics
from tests.owners import mine
from tests.unit.core import Core, until
from tests.unit.test_homes import Rows

MONITORING = Path(__file__).parent.parent.parent / "docs" / "monitoring"
RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load((MONITORING / "era-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
DASHBOARD = json.loads((MONITORING / "era-dashboard.json").read_text())

type Series = frozenset[tuple[str, str]]
type Look = dict[tuple[str, Series], float]

_COMPARE = {">": operator.gt, "<": operator.lt, "==": operator.eq}
_SELECTOR = re.compile(r"([a-z_]+)(?:\{(.*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)",?')


def look(metrics: str) -> Look:
    """The samples of a text in Prometheus' format, as a scrape has them: with the job."""
    return {
        (sample.name, frozenset({*sample.labels.items(), ("job", "era")})): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    } | {("up", frozenset({("job", "era")})): 1.0}


def matches(labels: Series, matchers: str) -> bool:
    named = dict(labels)
    assert _MATCHER.sub("", matchers) == "", matchers
    for name, how, pattern in _MATCHER.findall(matchers):
        value = named.get(name, "")
        same = value == pattern if how in ("=", "!=") else re.fullmatch(pattern, value) is not None
        if same == how.startswith("!"):
            return False
    return True


def vector(term: str, before: Look, after: Look) -> dict[Series, float]:
    """The values of a term, by series."""
    increase = re.fullmatch(r"increase\((.*)\[\d+[mh]\]\)", term)
    selector = _SELECTOR.fullmatch(increase[1] if increase else term)
    assert selector is not None, term
    found = {
        (name, labels): value
        for (name, labels), value in after.items()
        if name == selector[1] and matches(labels, selector[2] or "")
    }
    # A series that wasn't there before has not grown, for Prometheus.
    old = {key: before.get(key, value) for key, value in found.items()} if increase else dict.fromkeys(found, 0.0)
    return {labels: value - old[name, labels] for (name, labels), value in found.items()}


def fires(alert: str, before: Look, after: Look) -> bool:
    """Whether an alert's expression is true of the second look."""
    compared = re.fullmatch(r"(.*) (>|<|==) ([\d.]+)", RULES[alert]["expr"])
    assert compared is not None
    over, _, under = compared[1].partition(" / ")
    values = vector(over, before, after)
    if under:
        divisors = vector(under, before, after)
        values = {labels: value / divisors[labels] for labels, value in values.items()}
    return any(_COMPARE[compared[2]](value, float(compared[3])) for value in values.values())


class Watched:
    """A core whose metrics are looked at."""

    def __init__(self, core: Core, metrics: Metrics, admission: Admission) -> None:
        self.core = core
        self.metrics = metrics
        self.admission = admission
        self.data_dir = core.directory
        self.readiness = Readiness(core.directory / "aside", core.store.check_writable)
        self.first: Look = {}

    async def text(self) -> str:
        core = self.core
        parts = MeasuredParts(
            core.store,
            core.store.inboxes,
            core.store.webhooks,
            core.pool,
            self.admission,
            core.live_sessions,
            self.readiness,
            self.data_dir,
            lambda: core.blobs.written,
            lambda: 0,
            homes := Homes(Rows(), 60, lambda: None),
        )
        await homes.start()  # It leads then.
        try:
            return (await metrics_text(self.metrics, parts)).decode()
        finally:
            await homes.leave()

    async def look(self) -> Look:
        return look(await self.text())

    async def firing(self) -> set[str]:
        """The alerts that are true now."""
        after = await self.look()
        return {alert for alert in RULES if fires(alert, self.first, after)}


@pytest.fixture
async def watched(directory: Path, template: Path) -> AsyncIterator[Watched]:
    """A core with one sandbox at most and a processor, at rest."""
    metrics = Metrics()
    metrics.expect(["python"])
    async with Core.opened(directory, template, max_warm=1, processors=1, note=metrics.note) as core:
        watched = Watched(core, metrics, core.admission)
        watched.first = await watched.look()
        assert await watched.firing() - {"EraDiskFull"} == set()  # the machine's disk may be nearly full
        yield watched


async def test_runs_that_cannot_be_committed(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    core = watched.core
    await core.session()
    await core.run("print(1)")
    assert "EraRunsNotCommitted" not in await watched.firing()

    def failing(*_: object, **__: object) -> None:
        raise CommitFailed("the disk is no more")

    with monkeypatch.context() as patch:
        patch.setattr(core.snapshots, "take", failing)
        with pytest.raises(CommitFailed):
            await core.run("print(1)")
    assert "EraRunsNotCommitted" in await watched.firing()


async def test_errors_that_nobody_expected(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    await watched.core.session()

    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(watched.core.snapshots, "take", failing)
    with pytest.raises(ZeroDivisionError):
        await watched.core.run("print(1)")
    assert "EraBugs" in await watched.firing()


async def test_requests_that_fail(watched: Watched) -> None:
    def answered(route: str, status: int) -> None:
        watched.metrics.note(RequestEnded("req_1", "POST", route, status, 0.0, 0.1))

    run = "/api/sessions/{session_id}/run"
    for route, status in ((run, 200), (run, 404), ("/proxy", 502), ("site", 500), ("/ready", 503)):
        answered(route, status)
        answered(route, status)
    assert "EraServerErrors" not in await watched.firing()
    answered(run, 503)
    assert "EraServerErrors" in await watched.firing()


async def test_sandboxes_that_cannot_be_made(watched: Watched) -> None:
    await watched.core.session()
    watched.core.driver.refusals = 2
    with pytest.raises(SandboxFailed):
        await watched.core.run("print(1)")
    assert "EraSandboxesNotStarted" in await watched.firing()


async def test_more_sessions_than_sandboxes(watched: Watched) -> None:
    core = watched.core
    await core.session()
    async with holding(core, 1):
        waiting = asyncio.create_task(core.pool.acquire_temporary("python", owner="another"))
        await until(lambda: core.pool.places.waiting)
        assert "EraSandboxesFull" in await watched.firing()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert "EraSandboxesFull" not in await watched.firing()


@asynccontextmanager
async def holding(core: Core, count: int) -> AsyncIterator[None]:
    """Hold so many sandboxes."""
    held = [await core.pool.acquire_temporary("python", owner="holder") for _ in range(count)]
    try:
        yield
    finally:
        for sandbox in held:
            await core.pool.discard(sandbox)


async def test_more_runs_than_processors(watched: Watched) -> None:
    places = watched.admission.places

    async def run() -> None:
        try:
            await places.take("someone")
        except TooBusy:
            return

    for _ in range(places.count):
        await places.take("someone")
    waiting = [asyncio.create_task(run()) for _ in range(3 * places.count)]
    await until(lambda: places.waiting == len(waiting))
    assert "EraQueueLong" in await watched.firing()
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert "EraQueueLong" not in await watched.firing()


async def test_deliveries_that_wait(watched: Watched) -> None:
    core = watched.core
    session = await core.session(allow_public=True)
    await core.store.inboxes.put_inbox(mine("s"), None, 0)
    await core.store.inboxes.add_delivery(session.key, "dlv", None, Content("POST", "/", "", [], b"", "http://x.test"))
    long_ago = now() - 600 * 1_000_000
    await core.store.database.write(
        lambda c: c.execute(text("UPDATE deliveries SET received_at = :at"), {"at": long_ago})
    )
    assert "EraDeliveriesLate" not in await watched.firing(), "its session has no code yet"
    await core.store.store_code(mine("s"), StoredCode("pass", None, now()))
    assert "EraDeliveriesLate" in await watched.firing()


async def test_a_service_that_cannot_write(watched: Watched) -> None:
    watched.core.directory.joinpath("aside").rename(watched.core.directory / "away")
    watched.readiness = Readiness(watched.core.directory / "aside", watched.core.store.check_writable)
    assert "EraNotReady" in await watched.firing()


async def test_garbage_that_cannot_be_collected(watched: Watched) -> None:
    with LocalContent(watched.core.directory).held_off():  # as a backup does
        await collect_once(Snapshots(watched.core.blobs), watched.core.store, Pins(), watched.metrics.note)
    assert 'era_garbage_collections_total{outcome="put_off"} 1.0' in watched.metrics.text(()).decode()
    assert "EraGarbageNotCollected" not in await watched.firing()
    closed = SqlStore(f"sqlite:///{watched.core.directory}/era.sqlite")
    await closed.open()
    await closed.close()
    await collect_once(Snapshots(watched.core.blobs), closed, Pins(), watched.metrics.note)
    assert "EraGarbageNotCollected" in await watched.firing()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a mebibyte."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def test_a_disk_that_fills_up(watched: Watched, small_disk: Path) -> None:
    watched.data_dir = small_disk
    assert "EraDiskFull" not in await watched.firing()
    (small_disk / "large").write_bytes(bytes(1000 << 10))
    assert "EraDiskFull" in await watched.firing()


async def test_descriptors_that_run_out(watched: Watched) -> None:
    gc.collect()  # Garbage of earlier tests has descriptors, which a collection meanwhile would close.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    held: list[int] = []
    try:
        # 1,000 held and 50 spare, so that it takes 50 more or 50 fewer to matter.
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1050, hard))
        held += (os.open("/", os.O_PATH) for _ in range(1000))
        assert "EraDescriptorsScarce" in await watched.firing()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    assert "EraDescriptorsScarce" not in await watched.firing()


async def test_a_server_that_is_down(watched: Watched) -> None:
    """`up` is what Prometheus itself records of a scrape."""
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:1/metrics", trust_env=False)
    down = {("up", frozenset({("job", "era")})): 0.0}
    assert {alert for alert in RULES if fires(alert, watched.first, down)} == {"EraDown"}


async def test_rules_and_panels_use_what_there_is(watched: Watched) -> None:
    families = list(text_string_to_metric_families(await watched.text()))
    endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}
    names = {family.name + ending for family in families for ending in endings.get(family.type, ("",))} | {"up"}
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    expressions = [*panels, *(rule["expr"] for rule in RULES.values())]
    used = {name for each in expressions for name in re.findall(r"\b(?:era|process)_[a-z_]+\b", each)}
    assert len(used) > 30
    assert used - names == set()
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers) > 15


def test_each_rule_is_whole_and_tested() -> None:
    tests = Path(__file__).read_text()
    for alert, rule in RULES.items():
        assert tests.count(f'"{alert}"') >= 1, f"{alert} is not caused by any test"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
