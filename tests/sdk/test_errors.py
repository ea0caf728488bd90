"""Each code that the service answers has a class in its clients, of the family of its status."""

from __future__ import annotations

import ast
import re
import threading
from pathlib import Path

import era
from era.errors import EraError
from era.sdk.errors import answered_error
from tests.conftest import Server

ROOT = Path(__file__).resolve().parent.parent.parent
FAMILIES = {
    400: era.BadRequest, 404: era.NotFound, 409: era.Conflict, 413: era.TooLarge,
    503: era.Unavailable,
}  # fmt: skip


def classes() -> dict[str, type[EraError]]:
    """The classes of errors.py by name."""
    import era.errors

    found = vars(era.errors).values()
    return {each.__name__: each for each in found if isinstance(each, type) and issubclass(each, EraError)}


def codes() -> set[tuple[int, str]]:
    """What the service answers: the codes of its classes, and those that are given where one is raised."""
    by_name = classes()
    found = {(each.status, each.code) for each in by_name.values()}
    for path in (ROOT / "src" / "era").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in by_name:
                for word in node.keywords:
                    if word.arg == "code" and isinstance(word.value, ast.Constant):
                        found.add((by_name[node.func.id].status, str(word.value.value)))
    return found


def test_an_answer_becomes_an_error_of_its_family() -> None:
    """Of every code there is; not a test each, as all sources are read to find them."""
    found, by_name = codes(), classes()
    assert len(found) > 90
    for status, code in sorted(found):
        error = answered_error(status, {}, {"error": "E", "code": code, "hint": "H", "request_id": "r"})
        assert (error.status, error.code, error.message, error.hint, error.request_id) == (status, code, "E", "H", "r")
        if status in FAMILIES:
            assert isinstance(error, FAMILIES[status]), code
        own = [each for each in by_name.values() if (each.status, each.code) == (status, code)]
        assert not own or type(error) in own, code


def test_the_documented_classes_are_there() -> None:
    page = (ROOT / "docs" / "sdk-python.md").read_text().partition("## Errors")[2]
    for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", row):
            assert issubclass(getattr(era, name), EraError)


def test_threads_share_a_client(server: Server) -> None:
    with era.Era(server.url) as client:
        session = client.session("python")
        problems: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(5):
                    session.files.write(f"{number}.txt", f"{turn}")
                    assert session.files.text(f"{number}.txt") == f"{turn}"
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert len(session.files.list()) == 8
