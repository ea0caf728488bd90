/** Every call of the client, against a real server. */

import assert from "node:assert/strict";
import { test } from "node:test";
import {
  BadKey,
  BadNamespace,
  BadPath,
  BadRequest,
  Conflict,
  IdempotencyMismatch,
  InvalidField,
  NoFile,
  NoSuchVersion,
  NotFound,
  PreconditionFailed,
  SqlError,
} from "era-sessions";
import { all, client, lines } from "./support.ts";

const era = client();

const COUNT = lines(
  "import json",
  "data = json.load(open('.session_data.json'))",
  "data['n'] = data.get('n', 0) + 1",
  "json.dump(data, open('.session_data.json', 'w'))",
  "print(data['n'])",
);

test("a session remembers, and stays", async () => {
  const id = `ts:${crypto.randomUUID()}`;
  {
    await using session = await era.session("python", { session_id: id, data: { n: 1 }, metadata: { made: "here" } });
    const first = await session.run(COUNT);
    assert.deepEqual([first.stdout, first.status, first.exit_code], ["2\n", "ok", 0]);
    assert.equal((await session.run(COUNT)).data["n"], 3);
  }
  const again = await era.sessions.get(id);
  assert.deepEqual([again.info.metadata["made"], await again.data.get("n")], ["here", 3]);
  await assert.rejects(era.session("python", { session_id: id }), Conflict);
  await again.delete();
  await assert.rejects(era.sessions.get(id), NotFound);
  assert.equal(await (await era.sessions.restore(id)).data.get("n"), 3);
});

test("a session made without an id is gone at the end of its block", async () => {
  let id: string;
  {
    await using session = await era.session("python");
    id = session.id;
  }
  await assert.rejects(era.sessions.get(id), NotFound);
  assert.equal((await era.sessions.restore(id)).id, id);
  await using session = await era.session("python");
  await session.delete(); // and then it may be closed all the same
});

test("a run takes what a program takes", async () => {
  await using session = await era.session("python");
  const code = "import os, sys; print(sys.argv[1:], sys.stdin.read(), os.environ['WHO'])";
  const done = await session.run(code, { args: ["a", "b c"], stdin: "given", env: { WHO: "Ada" } });
  assert.equal(done.stdout, "['a', 'b c'] given Ada\n");
  assert.equal((await session.run(undefined, { command: ["echo", "$HOME"] })).stdout, "$HOME\n");
  const failed = await session.run("import sys; print('no', file=sys.stderr); sys.exit(3)");
  assert.deepEqual([failed.exit_code, failed.status, failed.stderr], [3, "failed", "no\n"]);
  assert.equal((await session.run("while True: pass", { timeout: 0.2 })).status, "timeout");
});

test("the same key is one run", async () => {
  await using session = await era.session("python");
  const code = "import time; print(time.time_ns())";
  const idempotencyKey = "order-17";
  const first = await session.run(code, { idempotencyKey });
  assert.equal((await session.run(code, { idempotencyKey })).stdout, first.stdout);
  assert.equal((await session.runs.list()).length, 1);
  await assert.rejects(session.run("print(2)", { idempotencyKey }), IdempotencyMismatch);
});

test("stored code", async () => {
  await using session = await era.session("python");
  await assert.rejects(session.run(), BadRequest);
  await session.setCode("print('stored')", "says so");
  assert.equal((await session.code()).description, "says so");
  assert.equal((await session.run()).stdout, "stored\n");
});

test("a stream gives output as it comes, then the result", async () => {
  await using session = await era.session("python");
  const stream = session.stream("import sys; print('süß 🎉', flush=True); print('no', file=sys.stderr, flush=True)");
  const events = await all(stream);
  assert.match(stream.runId ?? "", /^run_/);
  const text = (type: string) =>
    events.map((event) => (event.type === type && "content" in event ? event.content : ""));
  assert.deepEqual([text("stdout").join(""), text("stderr").join("")], ["süß 🎉\n", "no\n"]);
  const last = events.at(-1);
  assert.ok(last?.type === "done" && last.exit_code === 0 && last.run_id === stream.runId);
  assert.equal((await session.stream("print(1)").done()).status, "ok");
});

test("a stream that is left leaves its run, which can be stopped", async () => {
  await using session = await era.session("python");
  const stream = session.stream("import time; print('begun', flush=True); time.sleep(600)", { timeout: 600 });
  for await (const event of stream) {
    assert.deepEqual(event.type === "stdout" && event.content, "begun\n");
    break;
  }
  assert.equal((await session.runs.get(stream.runId ?? "").record()).status, "running");
  assert.equal((await stream.stop())?.status, "killed");
});

test("runs in the background", async () => {
  await using session = await era.session("python");
  const run = await session.background("import sys; print('out'); print('err', file=sys.stderr)");
  assert.equal((await run.wait()).status, "ok");
  assert.deepEqual([await run.stdout(), await run.stderr()], ["out\n", "err\n"]);
  const endless = await session.background("import time; time.sleep(600)", { timeout: 600 });
  assert.equal((await endless.stop()).status, "killed");
  assert.deepEqual((await all(session.runs)).map(({ run_id }) => run_id), [endless.id, run.id]);
});

test("data", async () => {
  await using session = await era.session("python", { data: { a: 1, deep: { list: [1, "zwei"] } } });
  assert.deepEqual(await session.data.get("deep"), { list: [1, "zwei"] });
  assert.equal(await session.data.get("toString"), undefined);
  await session.data.set("b", [true, null]);
  await session.data.delete("a");
  assert.deepEqual(await session.data.all(), { deep: { list: [1, "zwei"] }, b: [true, null] });
  await session.data.replace({});
  assert.deepEqual(await session.data.all(), {});
});

test("files", async () => {
  await using session = await era.session("python");
  const { files } = session;
  const name = "Ordner mit #?%/süß & 100% [1].txt";
  await files.write(name, "hällo");
  assert.equal(await files.text(name), "hällo");
  assert.equal((await session.run("import glob; print(open(glob.glob('*/*')[0]).read())")).stdout, "hällo\n");
  const bytes = Uint8Array.from({ length: 100_000 }, (_, at) => at % 251);
  await files.write("b.bin", bytes);
  assert.deepEqual(await files.read("b.bin"), bytes);
  await files.write("c.bin", new Blob([bytes]));
  await files.write("d.bin", new Blob([bytes]).stream());
  assert.deepEqual(new Uint8Array(await (await files.open("d.bin")).arrayBuffer()), bytes);
  assert.deepEqual((await files.list()).map(({ path }) => path), [name, "b.bin", "c.bin", "d.bin"]);
  assert.deepEqual((await all(files.iterate({ limit: 1, prefix: "b" }))).length, 1);
  assert.deepEqual([await files.exists("b.bin"), await files.exists("none")], [true, false]);
  await assert.rejects(files.write("b.bin", "x", { ifNoneMatch: "*" }), PreconditionFailed);
  const { etag } = (await files.list({ prefix: "b" }))[0] ?? {};
  await files.write("b.bin", "y", { ifMatch: `"${etag}"` });
  await files.remove("b.bin");
  await assert.rejects(files.read("b.bin"), NoFile);
  assert.deepEqual([(await files.stat("c.bin")).type, (await files.stat("c.bin")).size], ["file", 100_000]);
  await files.mkdir("sub/empty", { mode: "0700" });
  assert.equal((await files.move("c.bin", "sub/moved.bin")).to, "sub/moved.bin");
  const { url } = await files.link("sub/moved.bin", { expires_in: 60 });
  assert.deepEqual(new Uint8Array(await (await fetch(url)).arrayBuffer()), bytes);
  const archive = await (await files.archive("tar.gz")).arrayBuffer();
  await files.remove("Ordner mit #?%", { recursive: true });
  assert.equal((await files.extract(archive, { replace: true })).total_count, 3);
});

test("a name of dots never reaches another call", async () => {
  await using session = await era.session("python");
  for (const path of ["..", "../..", "a/../../b", ".", "a/./b", "", "/a", "a//b"]) {
    await assert.rejects(session.files.read(path), BadPath, path);
    await assert.rejects(session.files.remove(path), { code: "bad_path", status: 400 }, path);
  }
  await assert.rejects(era.sessions.get(".."), NotFound);
  await assert.rejects(era.sessions.restore("."), { code: "not_found", status: 404 });
  await assert.rejects(era.storage.kv("space").get(".."), BadKey);
  assert.throws(() => era.storage.kv(".."), BadNamespace);
  assert.throws(() => session.runs.get(".."), InvalidField);
  await assert.rejects(era.sessions.get("a/b"), NotFound); // a slash in an id is part of the id
  assert.equal((await era.sessions.get(session.id)).id, session.id);
});

test("versions", async () => {
  await using session = await era.session("python", { data: { n: 1 } });
  await session.files.write("a.txt", "one");
  const before = (await session.refresh()).version;
  await session.files.write("a.txt", "two");
  await session.data.set("n", 2);
  const { versions } = session;
  assert.deepEqual((await versions.list()).map(({ version }) => version), [4, 3, 2, 1]);
  assert.equal((await versions.get(before)).data["n"], 1);
  assert.equal((await versions.diff(3)).files.changed.length, 1);
  assert.equal(await versions.files(before).text("a.txt"), "one");
  assert.equal((await versions.name(before, "good")).name, "good");
  await versions.unname(before);
  assert.equal((await session.rollback(before)).data["n"], 1);
  assert.equal(await session.files.text("a.txt"), "one");
  await assert.rejects(versions.get(99), NoSuchVersion);
  await assert.rejects(versions.get("../.." as unknown as number), NotFound);
  const copy = await session.duplicate({ from_version: 4, data: { copied: true } });
  assert.deepEqual([await copy.data.all(), await copy.files.text("a.txt")], [{ copied: true }, "two"]);
  await copy.delete();
});

test("settings, setup and progress", async () => {
  await using session = await era.session("python", { setup: { commands: ["echo one", "echo two > made"] } });
  const seen: string[] = [];
  const result = await session.setup.wait({ onEvent: (event) => seen.push(event.type) });
  assert.deepEqual([result.success, result.commands_run.length, seen.at(-1)], [true, 2, "done"]);
  assert.equal(await session.files.text("made"), "two\n");
  assert.deepEqual((await session.setup.packages()).pip, []);
  await session.setup.again();
  assert.equal((await session.setup.wait()).success, true);
  assert.equal((await session.update({ default_timeout: 7, metadata: { a: "b" } })).default_timeout, 7);
  assert.match(await session.url(3000), /^http:\/\/3000-/);
  assert.match(await session.proxyUrl(3000), /\/proxy\//);
});

test("capsules", async () => {
  await using session = await era.session("python", { data: { n: 1 } });
  const capsule = await (await session.export({ versions: "current" })).arrayBuffer();
  const copy = await era.sessions.import_(capsule, { id: "ts:imported" });
  assert.deepEqual(await copy.data.all(), { n: 1 });
  assert.equal(copy.info.allowPublicAccess, false);
  await copy.delete();
  const open = await era.sessions.import_(capsule, { id: "ts:opened", public: true });
  assert.equal(open.info.allowPublicAccess, true);
  await open.delete();
});

test("the inbox", async () => {
  await using session = await era.session("python");
  await session.setCode("print(1)");
  const inbox = await session.inbox.set({ retries: 1 });
  await fetch(inbox.url, { method: "POST", body: "order" });
  const [delivery] = await all(session.inbox.deliveries());
  const content = await session.inbox.delivery(delivery?.id ?? "");
  assert.equal(content.body, "order");
  while (["pending", "running"].includes((await session.inbox.delivery(content.id)).status)) { /* it is run */ }
  assert.equal((await session.inbox.replay(content.id)).id, content.id);
  assert.equal((await session.inbox.get()).retries, 1);
  await session.inbox.delete();
  await assert.rejects(session.inbox.get(), NotFound);
});

test("storage", async () => {
  const kv = era.storage.kv("ts");
  await kv.set("user/7:a b", "Ada", { since: 2031 });
  assert.deepEqual(await kv.entry("user/7:a b"), { value: "Ada", metadata: { since: 2031 } });
  assert.deepEqual([await kv.get("user/7:a b"), await kv.get("none")], ["Ada", undefined]);
  await kv.set("other", "x");
  assert.deepEqual((await all(kv.list({ limit: 1 }))).map(({ name }) => name), ["other", "user/7:a b"]);
  await kv.delete("other");
  assert.equal(await kv.clear(), 1);
  const r2 = era.storage.r2("ts");
  const bytes = Uint8Array.from({ length: 70_000 }, (_, at) => at % 256);
  await r2.put("img/logo.bin", bytes, { kind: "logo" });
  assert.deepEqual(await r2.get("img/logo.bin"), bytes);
  assert.equal((await r2.object("img/logo.bin"))?.customMetadata["kind"], "logo");
  assert.equal(await r2.get("none"), undefined);
  assert.deepEqual((await all(r2.list({ prefix: "img/" }))).map(({ size }) => size), [70_000]);
  await r2.delete("img/logo.bin");
  assert.equal(await r2.clear(), 0);
  const d1 = era.storage.d1("ts");
  await d1.exec("CREATE TABLE t (n INTEGER, s TEXT)");
  await d1.query("INSERT INTO t VALUES (:n, :s)", { n: 1, s: "eins" });
  assert.deepEqual((await d1.query("SELECT * FROM t WHERE n = ?", [1])).results, [{ n: 1, s: "eins" }]);
  await assert.rejects(d1.query("SELEKT"), SqlError);
  assert.equal((await era.storage.resources({ type: "d1", namespace: "ts" })).total, 1);
  assert.ok((await era.storage.stats()).total >= 1);
  await d1.drop();
});

test("the server and its sessions", async () => {
  const made = [];
  for (let n = 0; n < 3; n++) made.push(await era.session("python", { metadata: { list: "ts" } }));
  const filter = { metadata: { list: "ts" } };
  const listed = await all(era.sessions.iterate({ ...filter, limit: 2 }));
  assert.deepEqual(new Set(listed.map(({ id }) => id)), new Set(made.map(({ id }) => id)));
  assert.throws(() => era.sessions.deleteAll({}), TypeError);
  assert.throws(() => era.sessions.deleteAll({ metadata: {} }), TypeError);
  assert.equal((await era.sessions.deleteAll({ ...filter, purge: true })).deleted_count, 3);
  const done = await era.execute("node", "console.log(require('./part.js') + 1)", {
    files: { "part.js": "module.exports = 41" },
  });
  assert.deepEqual([done.stdout, done.status], ["42\n", "ok"]);
  assert.ok((await era.languages()).some(({ name }) => name === "python"));
  assert.equal((await era.health())["status"], "ok");
  assert.ok((await era.server()).limits.some(({ name }) => name === "ERA_MEMORY_MB"));
  assert.deepEqual(await era.hosts(), []);
});
