"""Which addresses are refused, without a network; and what the setting may lift."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from era.core.allowlist import NotAnEntry, allowlist
from era.errors import BadRequest
from era.network.policy import Policy, private_ranges

REFUSED = {
    "loopback": ["127.0.0.1", "127.255.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0"],
    "link_local": [
        "169.254.169.254",
        "fe80::1",
        "febf::1",
        "::ffff:a9fe:a9fe",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
    ],
    "cloud_platform": [
        "168.63.129.16",
        "::ffff:168.63.129.16",
        "64:ff9b::168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
    ],
    "private": [
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "198.18.0.1",
        "fc00::1",
        "fdff::1",
        "fec0::1",
        "::ffff:10.0.0.1",
        "::10.0.0.1",
        "::ffff:0:10.0.0.1",
        "2002:a00:1::",
        "2001:db8::5efe:10.0.0.1",
        "2001:db8::200:5efe:192.168.0.1",
    ],
    "shared": ["100.64.0.1", "100.127.255.255", "::ffff:100.64.0.1"],
    "multicast": ["224.0.0.1", "239.1.1.1", "ff02::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.0.191", "2001:0:1::", "64:ff9b:1::a00:1", "100::1"],
}
LET_PASS = [
    "1.1.1.1",
    "8.8.8.8",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.0.1",
    "172.32.0.1",
    "192.169.0.1",
    "126.0.0.1",
    "168.63.129.15",
    "168.63.129.17",
]
LET_PASS += [
    "128.0.0.1",
    "223.255.255.1",
    "169.253.0.1",
    "2606:4700::1111",
    "::ffff:1.1.1.1",
    "64:ff9b::101:101",
]


@pytest.mark.parametrize(("rule", "address"), [(rule, one) for rule, every in REFUSED.items() for one in every])
def test_addresses_of_no_business_of_programs_are_refused(rule: str, address: str) -> None:
    refusal = Policy().refuses(ip_address(address))
    assert refusal is not None
    assert refusal.name == rule


@pytest.mark.parametrize("address", LET_PASS)
def test_public_addresses_pass(address: str) -> None:
    assert Policy().refuses(ip_address(address)) is None


def test_a_setting_lifts_private_ranges_and_nothing_else() -> None:
    policy = Policy(private_ranges("10.1.0.0/16, 100.64.0.0/10,fd00::/8"))
    assert [policy.refuses(ip_address(one)) for one in ("10.1.2.3", "100.64.0.1", "fd00::1", "::ffff:10.1.0.1")] == [
        None
    ] * 4
    assert all(
        policy.refuses(ip_address(one)) for one in ("10.2.0.1", "192.168.0.1", "fc00::1", "127.0.0.1", "169.254.0.1")
    )


def test_a_setting_opens_no_services_of_clouds() -> None:
    """They stand in ranges that it may lift."""
    policy = Policy(private_ranges("100.64.0.0/10, fc00::/7"))
    refused = [policy.refuses(ip_address(one)) for one in REFUSED["cloud_platform"]]
    assert {rule and rule.name for rule in refused} == {"cloud_platform"}
    assert not any(map(policy.refuses, map(ip_address, ("100.100.100.201", "fd00:ec1::254", "fd20:ce::253"))))
    assert policy.refuses(ip_address("::ffff:100.100.100.200"))


@pytest.mark.parametrize(
    "text",
    ["127.0.0.0/8", "0.0.0.0/0", "169.254.169.254", "8.8.8.0/24", "10.0.0.0/7", "::/0", "10.0.0.1/8", "x", "224.0.0.1"],
)
def test_a_setting_that_would_lift_more_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="ERA_EGRESS_PRIVATE"):
        private_ranges(text)


def test_names_are_compared_as_dns_does() -> None:
    allowed = allowlist(["Api.Example.com", "*.github.com", "bücher.example", "203.0.113.7", "2001:db8::/32"])
    for name in ("api.example.com", "API.EXAMPLE.COM.", "a.b.github.com", "xn--bcher-kva.example", "BÜCHER.example"):
        assert allowed.has_name(name), name
    for name in ("example.com", "xapi.example.com", "github.com", "evilgithub.com", "api.example.com.evil.test", ""):
        assert not allowed.has_name(name), name
    assert allowed.has_address(ip_address("203.0.113.7"))
    assert not allowed.has_address(ip_address("203.0.113.8"))
    assert allowed.has_address(ip_address("2001:db8:9::1"))
    assert allowlist([]).has_name("anything.test")


@pytest.mark.parametrize("entry", ["127.1", "0x7f.1", "2130706433", "a..b", "-a.test", "a/b", "*.*.test", "a.*"])
def test_what_is_no_name_and_no_range_is_no_entry(entry: str) -> None:
    with pytest.raises(NotAnEntry):
        allowlist([entry])
