"""Languages over HTTP: their names, what this machine can't run, and how a language is added."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import pytest

import era
from era.languages import LANGUAGES
from tests.conftest import MakeServer, MakeSession, Run
from tests.soaking import soak_the_rest

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {
    "python": ["py"],
    "node": ["javascript", "js", "nodejs"],
    "typescript": ["ts"],
    "deno": [],
    "go": ["golang"],
    "shell": ["sh", "bash"],
}
ABSENT = """
from era.languages.base import Definition, Missing

def _find():
    raise Missing("There is no cobc.", "Ask your grandparents.")

LANGUAGE = Definition(name="cobol", title="COBOL", aliases=("cbl",), entry="main.cbl", find=_find)
"""


def test_all_languages_are_listed(client: httpx.Client) -> None:
    languages = client.get("/api/languages").json()["languages"]
    assert {language["name"]: language["aliases"] for language in languages} == NAMES
    assert [language["name"] for language in languages] == list(LANGUAGES) == client.get("/health").json()["languages"]
    for language in languages:
        assert language["available"] is True
        assert re.match(r"\d+\.\d+", language["version"])
        assert "reason" not in language
    packages = {language["name"]: language["packages"] for language in languages}
    assert packages == {"python": "pip", "node": "npm", "typescript": "npm", "deno": None, "go": "go", "shell": None}
    assert {one["name"] for one in languages if one["contexts"]} == {"python", "node", "typescript"}
    endings = [ending for language in languages for ending in language["endings"]]
    assert len(endings) == len(set(endings))


def test_every_alias_is_its_language(client: httpx.Client) -> None:
    for name, aliases in NAMES.items():
        for alias in [*aliases, name.upper()]:
            made = client.post("/api/sessions", json={"language": alias})
            assert (made.status_code, made.json()["language"]) == (201, name)


def test_unknown_languages_are_refused(client: httpx.Client) -> None:
    for path, body in (("/api/sessions", {}), ("/api/execute", {"code": "1"})):
        answer = client.post(path, json={"language": "brainfuck", **body})
        assert (answer.status_code, answer.json()["code"]) == (400, "unknown_language")
        assert "deno, go, node, python, shell or typescript" in answer.json()["hint"]


GO = """package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Println(len(os.Args), os.Getenv("ERA_LANGUAGE"))
	%s
}
"""


def test_go_programs_run_by_execute(client: httpx.Client) -> None:
    def go(line: str) -> dict[str, object]:
        answer = client.post("/api/execute", json={"language": "golang", "code": GO % line, "timeout": 120})
        assert answer.status_code == 200
        outcome: dict[str, object] = answer.json()
        return outcome

    outcome = go("os.Exit(3)")
    assert (outcome["exit_code"], outcome["stdout"], outcome["stderr"], outcome["language"]) == (3, "1 go\n", "", "go")
    outcome = go("unused := 1")
    assert (outcome["exit_code"], outcome["stdout"]) == (1, "")
    assert "./main.go:10:2: declared and not used: unused" in str(outcome["stderr"])


def test_deno_has_only_the_permissions_of_its_session(client: httpx.Client) -> None:
    def printed(code: str) -> str:
        answer = client.post("/api/execute", json={"language": "deno", "code": code, "allowInternetAccess": False})
        return str(answer.json()["stdout"])

    assert "NotCapable" in printed("try { await fetch('http://192.0.2.1') } catch (e) { console.log(String(e)) }")
    assert "NotCapable" in printed("try { Deno.writeTextFileSync('/opt/x', '') } catch (e) { console.log(String(e)) }")
    served = "const s = Deno.serve({ port: 0, hostname: '127.0.0.1', onListen() {} }, () => new Response('ours'));"
    asks = "console.log(await (await fetch(`http://127.0.0.1:${s.addr.port}`)).text()); await s.shutdown();"
    assert printed(served + asks) == "ours\n"


# -- another one ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", soak_the_rest(["node", "typescript"], 1))
def test_no_output_is_cut_by_an_exit_of_node_s(run: Run, session: MakeSession, language: str) -> None:
    """More than any pipe takes; of the program itself, and of what it starts, which has the same pipe."""
    where = session(language=language)
    code = """
import { spawnSync } from 'node:child_process';
console.log('x'.repeat(5_000_000));
console.error('y'.repeat(5_000_000));
spawnSync('head', ['-c', '3000000', '/dev/zero'], { stdio: 'inherit' });
console.log('z'.repeat(1_000_000));
process.exit(3);
"""
    for _ in range(3):  # in a Node that is started for it, and in one that waited
        answer = run(where, code)
        assert (len(answer["stdout"]), len(answer["stderr"]), answer["exit_code"]) == (9_000_002, 5_000_001, 3)


@pytest.fixture(scope="module")
def with_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ERA with two more languages: the example of the docs, and one that no machine has."""
    directory = tmp_path_factory.mktemp("more")
    shutil.copytree(Path(era.__file__).parent, directory / "era", ignore=shutil.ignore_patterns("__pycache__"))
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/languages.md").read_text(), re.DOTALL)
    assert example is not None
    (directory / "era/languages/ruby.py").write_text(example[1])
    (directory / "era/languages/cobol.py").write_text(ABSENT)
    return directory


def test_a_language_is_one_file(own_server: MakeServer, with_more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(with_more))
    with own_server().client() as client:
        languages = {language["name"]: language for language in client.get("/api/languages").json()["languages"]}
        assert set(languages) == {*LANGUAGES, "ruby", "cobol"}
        assert (languages["cobol"]["available"], languages["cobol"]["version"]) == (False, None)
        assert (languages["cobol"]["reason"], languages["cobol"]["hint"]) == (
            "There is no cobc.",
            "Ask your grandparents.",
        )
        for path, body in (("/api/sessions", {}), ("/api/execute", {"code": "1"})):
            answer = client.post(path, json={"language": "cbl", **body})
            assert (answer.status_code, answer.json()["code"]) == (503, "no_language")
            assert answer.json()["hint"] == "Ask your grandparents."
            assert "Retry-After" not in answer.headers
        assert "cobol" not in client.get("/health").json()["languages"]

        if not languages["ruby"]["available"]:
            assert "apt-get install ruby" in languages["ruby"]["hint"]
            pytest.skip("Ruby is not installed on this machine")
        client.post("/api/sessions", json={"language": "rb", "session_id": "ruby", "data": {"n": 1}})
        code = """require 'json'
data = JSON.parse(File.read('.session_data.json'))
File.write('.session_data.json', JSON.generate({n: data['n'] + 1}))
puts "grüße #{ENV['GIVEN']} #{ARGV.length} #{STDIN.read.length}"
raise 'mine'
"""
        for n in (2, 3):
            outcome = client.post("/api/sessions/ruby/run", json={"code": code, "env": {"GIVEN": "süß"}}).json()
            assert (outcome["stdout"], outcome["exit_code"], outcome["data"]) == ("grüße süß 0 0\n", 1, {"n": n})
            assert "main.rb:5:in" in outcome["stderr"]
