"""Whole projects with common packages: pushed, tested, run, and served."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.api.guest_servers import serve_in_background
from tests.api.live import content, events, process, start
from tests.api.setups import make, settled
from tests.client.command import era
from tests.client.test_sync import write
from tests.conftest import MakeServer, Run, Server, eventually
from tests.packages.registry import serving

FLASK = {
    "shop/__init__.py": """\
from flask import Flask

def create_app():
    app = Flask(__name__)
    from . import views
    app.register_blueprint(views.pages)
    return app
""",
    "shop/views.py": """\
from flask import Blueprint, abort, jsonify, render_template, request, url_for

pages = Blueprint("pages", __name__)
ITEMS = {"tea": 3}

@pages.get("/")
def index():
    return render_template("index.html", items=ITEMS)

@pages.route("/items/<name>", methods=["GET", "PUT"])
def item(name):
    if request.method == "PUT":
        ITEMS[name] = request.get_json()["price"]
    if name not in ITEMS:
        abort(404)
    return jsonify(name=name, price=ITEMS[name], url=url_for("pages.item", name=name))
""",
    "shop/templates/index.html": "<ul>{% for name in items %}<li>{{ name }}</li>{% endfor %}</ul>\n",
    "tests/conftest.py": """\
import pytest
from shop import create_app

@pytest.fixture
def client():
    return create_app().test_client()
""",
    "tests/test_shop.py": """\
import pytest

def test_page(client):
    assert client.get("/").text == "<ul><li>tea</li></ul>"

@pytest.mark.parametrize("name", ["tea", "<milk>"])
def test_items(client, name):
    assert client.put(f"/items/{name}", json={"price": 5}).status_code == 200
    assert client.get(f"/items/{name}").json["price"] == 5

def test_nothing(client):
    assert client.get("/items/gold").status_code == 404
""",
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\naddopts = "-p no:cacheprovider"\n',
}


RUNNING = """\
import json
from urllib.request import Request, urlopen

def test_the_running_app():
    item = "http://127.0.0.1:5000/items/coffee"
    sent = Request(item, b'{"price": 7}', {"Content-Type": "application/json"}, method="PUT")
    assert urlopen(sent).status == 200
    assert json.load(urlopen(item))["price"] == 7
"""


@pytest.mark.soak
def test_a_flask_app_and_its_tests(server: Server, client: httpx.Client, run: Run, tmp_path: Path) -> None:
    setup = {"pip": {"requirements": "flask\npytest"}}
    where = make(client, setup, service="flask --app shop run --port $PORT", default_timeout=60)
    write(tmp_path, **FLASK)
    era(server, "push", str(tmp_path), "--session", where, code=0)
    outcome = run(where, "import pytest, sys\nsys.exit(pytest.main(['-q']))")
    assert (outcome["exit_code"], outcome["stderr"]) == (0, ""), outcome
    assert "4 passed" in outcome["stdout"]
    url = f"/proxy/{where}/3000"
    assert client.get(f"{url}/").text == "<ul><li>tea</li></ul>"
    answer = client.put(f"{url}/items/milk", json={"price": 2})
    assert answer.json() == {"name": "milk", "price": 2, "url": "/items/milk"}
    assert "<li>milk</li>" in client.get(f"{url}/").text
    assert client.get(f"{url}/items/gold").status_code == 404
    client.put(f"/api/sessions/{where}/files/tests/test_more.py", content=b"def test_wrong(): assert 1 == 2\n")
    outcome = run(where, "import pytest, sys\nsys.exit(pytest.main(['-q']))")
    assert (outcome["exit_code"], outcome["status"]) == (1, "failed")
    assert "1 failed, 4 passed" in outcome["stdout"]

    # The tests of an app that runs beside them.
    start(client, where, "exec flask --app shop run --port 5000", tag="app")
    client.put(f"/api/sessions/{where}/files/tests/test_running.py", content=RUNNING.encode())
    # Whoever asks before it listens has the session's service started at this port, and not the process.
    said = b""
    for _, event in events(client, where, "app"):
        said += content(event) if "content" in event else b""
        if b"Running on" in said:
            break
    assert eventually(lambda: client.get(f"/proxy/{where}/5000/items/tea").status_code == 200)
    outcome = run(where, "import pytest, sys\nsys.exit(pytest.main(['-q', 'tests/test_running.py']))")
    assert (outcome["exit_code"], "1 passed" in outcome["stdout"]) == (0, True), outcome
    assert client.get(f"/proxy/{where}/5000/items/coffee").json()["price"] == 7, "it is the same app"
    assert process(client, where, "app")["status"] == "running"
    client.post(f"/api/sessions/{where}/stop")


EXPRESS = {
    "package.json": '{"name": "api", "type": "module", "dependencies": {"express": "*", "zod": "*", "lodash": "*"}}',
    "src/index.ts": """\
import { createServer } from "node:http";
import express, { type NextFunction, type Request, type Response } from "express";
import { items } from "./routes/items.ts";

const app = express();
app.use(express.json());
app.use("/items", items);
app.use((error: Error, request: Request, response: Response, next: NextFunction) => {
  response.status(400).json({ error: error.name });
});
createServer(app).listen(3000, () => console.log("listening"));
""",
    "src/routes/items.ts": """\
import { Router } from "express";
import lodash from "lodash";
import { z } from "zod";

enum Kind { Drink = "drink", Food = "food" }
const Item = z.object({ name: z.string().min(1), kind: z.nativeEnum(Kind), price: z.number().positive() });
type Item = z.infer<typeof Item>;
const all: Item[] = [];

export const items = Router();
items.post("/", (request, response) => {
  all.push(Item.parse(request.body));
  response.status(201).json(all.length);
});
items.get("/", (request, response) => {
  response.json(lodash.mapValues(lodash.groupBy(all, "kind"), (found: Item[]) => lodash.sumBy(found, "price")));
});
""",
}


@pytest.mark.soak
def test_an_express_api_in_typescript(server: Server, client: httpx.Client, run: Run, tmp_path: Path) -> None:
    where = make(client, {"npm": ["express", "zod", "lodash", "@types/express", "@types/lodash"]}, "typescript")
    write(tmp_path, **EXPRESS)
    era(server, "push", str(tmp_path), "--session", where, code=0)
    settled(client, where)
    serve_in_background(client, where, 'import "./src/index.ts"', timeout=60)
    url = f"/proxy/{where}/3000/items"
    for count, item in enumerate(
        (
            {"name": "tea", "kind": "drink", "price": 3},
            {"name": "rice", "kind": "food", "price": 2},
            {"name": "milk", "kind": "drink", "price": 1.5},
        )
    ):
        answer = client.post(url, json=item)
        assert (answer.status_code, answer.json()) == (201, count + 1), answer.text
    assert client.post(url, json={"name": "", "kind": "drink", "price": 3}).json() == {"error": "ZodError"}
    assert client.post(url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.get(url).json() == {"drink": 4.5, "food": 2}


GO = {
    "go.mod": "module example.com/app\n\ngo 1.24\n\n"
    "require (\n\texample.com/colour v1.0.0\n\texample.com/words v1.0.0\n)\n",
    "internal/sign/sign.go": """\
package sign

import (
	"fmt"

	"example.com/colour"
	"example.com/words/title"
)

func Make(text string) string { return fmt.Sprintf("%s %s", colour.Red, title.Of(text)) }
""",
}
MAIN = """\
package main

import (
	"fmt"
	"os"

	"example.com/app/internal/sign"
)

func main() {
	fmt.Println(sign.Make(os.Getenv("TEXT")))
}
"""


def test_a_go_module_with_two_dependencies(
    own_server: MakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One dependency has a dependency of its own. The module proxy is gone by the time the program is built."""
    with serving() as registry:
        registry.put_go("example.com/base", {"base.go": "package base\n\nconst Mark = `!`\n"})
        registry.put_go("example.com/colour", {"colour.go": "package colour\n\nconst Red = `red`\n"})
        sub = 'package title\n\nimport (\n\t"strings"\n\n\t"example.com/base"\n)\n\n'
        sub += "func Of(text string) string { return strings.ToUpper(text) + base.Mark }\n"
        registry.put_go("example.com/words", {"title/title.go": sub}, requires=["example.com/base"])
        for name, value in registry.environment().items():
            monkeypatch.setenv(name, value)
        server = own_server()
        with server.client() as client:
            where = make(client, {"go": {"goMod": GO["go.mod"]}}, "go", default_timeout=120)
            found = settled(client, where)
    assert [name.rpartition("@")[0] for name in found["setup_result"]["go_modules"]] == [
        "example.com/base", "example.com/colour", "example.com/words",
    ]  # fmt: skip
    write(tmp_path / "project", **GO)
    era(server, "push", str(tmp_path / "project"), "--session", where, code=0)
    with server.client() as client:
        outcome = client.post(f"/api/sessions/{where}/run", json={"code": MAIN, "env": {"TEXT": "stop"}}).json()
        assert (outcome["stdout"], outcome["stderr"]) == ("red STOP!\n", ""), outcome
        assert {file["path"] for file in client.get(f"/api/sessions/{where}/files").json()["files"]} == set(GO)
