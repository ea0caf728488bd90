"""Jupyter Kernel Gateway: the usual way of running Python over HTTP in an interpreter that stays, without a sandbox.

It is installed by `make bench` only, and its cases are left out where it isn't there.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bench.arena import Arena
from bench.cases import Case, Probe, Ratio

_PROGRAM = Path(sys.executable).parent / "jupyter-kernelgateway"
_START_SECONDS = 60.0
_ANSWER_SECONDS = 60.0


class _Kernel:
    """A kernel of the gateway, with the connection by which code is sent to it."""

    def __init__(self, port: int) -> None:
        import websocket

        self._port = port
        status, answer = _call(port, "POST", "/api/kernels")
        if status != 201:
            raise RuntimeError(f"The gateway made no kernel: {status} {answer!r}")
        self._id = str(json.loads(answer)["id"])
        self._connection = websocket.create_connection(
            f"ws://127.0.0.1:{port}/api/kernels/{self._id}/channels",
            timeout=_ANSWER_SECONDS,
            sockopt=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),  # or each message would wait for an acknowledgement
        )

    def run(self, code: str) -> str:
        """Execute code and return what it printed, or its value, once the kernel is idle again. Raises RuntimeError."""
        message = secrets.token_hex(8)
        header = {"msg_id": message, "msg_type": "execute_request", "username": "", "session": "", "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": True}
        request = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self._connection.send(json.dumps(request))
        printed = ""
        while True:
            told: dict[str, Any] = json.loads(self._connection.recv())
            if told["parent_header"].get("msg_id") != message:
                continue
            match told["msg_type"]:
                case "stream":
                    printed += told["content"]["text"]
                case "execute_result":
                    printed += told["content"]["data"]["text/plain"]
                case "error":
                    raise RuntimeError(f"Code went wrong in the kernel: {told['content']}")
                case "status" if told["content"]["execution_state"] == "idle":
                    return printed

    def close(self) -> None:
        self._connection.close()
        _call(self._port, "DELETE", f"/api/kernels/{self._id}")


def _call(port: int, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@cache
def _gateway(arena: Arena) -> int:
    """Start a gateway, which ends with the arena. Its port. Raises RuntimeError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    home = arena.scratch / "gateway"
    home.mkdir()
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    log = (home / "log").open("wb")
    process = subprocess.Popen(
        [_PROGRAM, f"--KernelGatewayApp.port={port}", "--KernelGatewayApp.port_retries=0"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=home,
        env={**os.environ, **places, "IPYTHONDIR": str(home / "ipython")},
    )
    log.close()

    def stop() -> None:
        process.terminate()
        process.wait()

    arena.closers.callback(stop)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            if _call(port, "GET", "/api")[0] == 200:
                return port
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The gateway does not start:\n{(home / 'log').read_text()}")
        time.sleep(0.1)


def _check(printed: str, output: str = "1\n") -> None:
    if printed != output:
        raise RuntimeError(f"The kernel printed {printed!r}.")


def warm(code: str = "print(1)", output: str = "1\n") -> Callable[[Arena], Probe]:
    """A cell in a kernel that has run before. Its variables stay, its files aren't kept apart from anybody's."""

    def start(arena: Arena) -> Probe:
        kernel = _Kernel(_gateway(arena))
        arena.closers.callback(kernel.close)
        kernel.run("pass")
        return Probe(lambda _: kernel.run(code), after=lambda printed: _check(printed, output))

    return start


def cold(arena: Arena) -> Probe:
    """A kernel made for one cell."""
    port = _gateway(arena)

    def call(_: object) -> tuple[_Kernel, str]:
        kernel = _Kernel(port)
        return kernel, kernel.run("print(1)")

    def after(answer: tuple[_Kernel, str]) -> None:
        answer[0].close()
        _check(answer[1])

    return Probe(call, after=after)


CASES: list[Case] = []
RATIOS: list[Ratio] = []
if _PROGRAM.exists() and importlib.util.find_spec("websocket"):
    CASES += [
        Case("gateway warm", "a cell in a warm kernel of Jupyter Kernel Gateway", warm(), 0.05),
        Case("gateway value", "1+1 there", warm("1+1", "2"), 0.05),
        Case("gateway cold", "a kernel made there for one cell", cold, 0.2, burst=2),
    ]
    RATIOS += [
        Ratio("python warm", "gateway warm", goal=0.2),
        Ratio("context", "gateway value", goal=0.3),
        Ratio("create and run", "gateway cold"),
    ]
