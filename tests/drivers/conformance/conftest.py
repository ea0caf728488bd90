"""What the suite has in common: the drivers, and where each is known to fall short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import OWN_DRIVER
from tests.drivers.as_user import opened
from tests.drivers.conformance.helpers import shared

DRIVERS = ["fake", "bubblewrap", "bubblewrap as a user", "gvisor", "gvisor as a user"]

KNOWN: dict[tuple[str, str], str] = {
    ("test_output_before_an_exit_of_node_s_is_not_cut", "fake"): "its pipes have the usual size",
    ("test_how_out_of_memory_looks", "gvisor as a user"): (
        "the program is ended once its sandbox has taken too much: gVisor doesn't bound a process's private data"
    ),
}
"""Tests that are known to fail with a driver, and why."""

for test in (
    "test_the_working_directory",
    "test_there_is_no_network",
    "test_tmp_is_fresh_in_each_run",
    "test_other_processes_are_invisible",
    "test_system_files_are_the_sandbox_s_own",
    "test_no_file_of_a_program_has_set_id",
):
    KNOWN[test, "fake"] = "the fake driver has no isolation"
for driver in ("gvisor", "gvisor as a user"):
    KNOWN["test_the_supervisor_can_t_be_killed", driver] = "gVisor does not protect PID 1 as Linux does"
    KNOWN["test_dev_can_t_be_changed", driver] = (
        "a read-only /dev in gVisor has read-only devices: the sandbox goes instead"
    )

for driver in ("bubblewrap as a user", "gvisor as a user"):
    KNOWN["test_everything_can_stand_still", driver] = "an ordinary user has no control group"
for driver in ("gvisor", "gvisor as a user"):
    KNOWN["test_variables_are_hidden_from_other_processes", driver] = "gVisor has no Landlock"

NEVER: dict[tuple[str, str], str] = {
    ("test_how_out_of_memory_looks", "fake"): "it would be the host's memory",
    ("test_dev_can_t_be_changed", "fake"): "it would be the host's /dev",
    ("test_the_supervisor_can_t_be_killed", "fake"): "it would be the host's init",
    ("test_out_of_memory", "fake"): "it would be the host's memory",
    ("test_how_a_program_is_scheduled_is_its_own_affair", "fake"): "it would be all of the host's processes",
    ("test_a_daemon_does_not_outlive_the_run", "fake"): "it would outlive the tests",
    ("test_too_many_processes", "fake"): "they would be the host's processes",
    ("test_no_program_sets_the_limits_of_later_runs", "fake"): "it would be the host's init",
    ("test_no_message_queue_of_a_run_is_there_in_the_next", "fake"): "it would be the host's queue",
}
"""Tests that aren't even tried with a driver, and why."""

for test in (
    "test_a_guest_listener_leads_to_the_host_while_that_listens",
    "test_connections_to_the_host_are_whole",
    "test_a_stalled_connection_holds_up_no_other",
    "test_the_end_of_a_run_is_the_end_of_its_connections",
    "test_many_connections_at_a_time",
    "test_the_host_can_connect_to_a_port_inside",
):
    NEVER[test, "fake"] = "it has no network of its own, and so no guest listeners"

for driver in ("gvisor", "gvisor as a user"):
    NEVER["test_files_in_memory_are_bounded_beside_processes", driver] = "gVisor doesn't count files in memory"


for test in (
    "test_a_python_context",
    "test_a_node_context",
    "test_packages_of_contexts_are_for_contexts",
    "test_a_run_doesn_t_meet_a_context",
):
    NEVER[test, "fake"] = "interpreters have other places on the host"
for test in ("test_the_state_file_whatever_it_has_become",):
    NEVER[test, "fake"] = "what is killed and stopped would be the host's processes"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take each of DRIVERS, or the one that `--driver` names."""
    if "sandboxes" in metafunc.fixturenames:
        own = metafunc.config.getoption(OWN_DRIVER)
        metafunc.parametrize("sandboxes", [own] if own else DRIVERS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def sandboxes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Sandboxes of each driver: Sandboxes, or UserSandboxes."""
    with opened(request.param, tmp_path_factory.mktemp("sandboxes")) as made:
        yield made


@pytest.fixture(autouse=True)
def expect_known_failures(request: pytest.FixtureRequest) -> None:
    """Expect the failures of KNOWN and NEVER."""
    test, driver = request.node.originalname, request.node.callspec.params["sandboxes"]
    if driver == "fake" and request.module.__name__.endswith(("test_processes", "test_names_in_the_way")):
        pytest.xfail("it has no processes beside runs")
    if reason := NEVER.get((test, driver)):
        pytest.xfail(reason)
    if reason := KNOWN.get((test, driver)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture
def sandbox(sandboxes: Any) -> Any:
    """A sandbox that other tests have used, too."""
    return shared(sandboxes, "python")
