/** Processes and terminals of a session. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { bytesOf, Conflict, NotFound, type ProcessEvent } from "era-sessions";
import { all, client, HangingUp, lines } from "./support.ts";

const era = client();
const options = { isolation: "bubblewrap" } as const;

function text(events: ProcessEvent[], type: "stdout" | "stderr" | "pty"): string {
  return events.map((event) => (event.type === type ? new TextDecoder().decode(bytesOf(event)) : "")).join("");
}

test("a process has input, output, a tag and an end", async () => {
  await using session = await era.session("python", options);
  const process = await session.process(["cat"], { stdin: true, tag: "cat" });
  await assert.rejects(session.process("sleep 600", { tag: "cat" }), Conflict);
  await session.processes.get("cat").write("süß\n");
  await process.write(Uint8Array.of(0xff, 10));
  await process.closeInput();
  const events = await all(process.events());
  assert.equal(text(events, "stdout"), "süß\n\uFFFD\n");
  const last = events.at(-1);
  assert.ok(last?.type === "exit" && last.exit_code === 0);
  assert.equal((await process.wait()).status, "ended");
});

test("a process is signalled and ended", async () => {
  await using session = await era.session("python", options);
  const trap = lines("trap 'echo got it; exit 7' INT", "echo ready", "while true; do sleep 0.05; done");
  const process = await session.process(trap);
  for await (const event of process.events()) {
    if (event.type === "stdout" && event.content.includes("ready")) await process.signal("INT");
    if (event.type === "exit") assert.equal(event.exit_code, 7);
  }
  const endless = await session.process(["sleep", "600"]);
  assert.equal((await endless.end()).signal, "TERM");
  assert.deepEqual((await session.processes.list()).map(({ status }) => status), ["ended", "ended"]);
  const another = await session.process("echo made > made.txt; exec sleep 600");
  while (!(await session.run("import os; print(os.path.exists('made.txt'))")).stdout.includes("True")) { /* soon */ }
  await session.stop();
  assert.equal((await another.info()).status, "ended");
  assert.equal(await session.files.text("made.txt"), "made\n");
  await assert.rejects(session.processes.get("none").info(), NotFound);
});

test("a checkpoint keeps what a process has written", async () => {
  await using session = await era.session("python", options);
  const before = await session.checkpoint();
  assert.ok(before.consistent);
  await session.process("echo made > made.txt; exec sleep 600");
  while ((await session.files.list()).length === 0) { /* soon */ }
  const made = await session.checkpoint();
  assert.ok(made.version > before.version);
  assert.equal(await session.versions.files(made.version).text("made.txt"), "made\n");
});

test("a watch goes on where its connection broke", async () => {
  await using session = await era.session("python", options);
  await session.process("exec sleep 600");
  await using proxy = new HangingUp(/\/watch/, [900]);
  const through = await client({ url: await proxy.start() }).sessions.get(session.id);
  let begun = 0;
  for await (const event of through.files.watch({ recursive: true })) {
    if (event.type === "watching") begun++;
    if (event.type === "create" && event.path === "last.txt") break;
    if (begun === 1) await session.files.write(`${"x".repeat(100)}${Math.random()}`, "1");
    else await session.files.write("last.txt", "2");
  }
  assert.equal(begun, 2);
});

test("a watch goes on when the session becomes live", async () => {
  await using session = await era.session("python", options);
  const types: string[] = [];
  for await (const event of session.files.watch({ path: "." })) {
    types.push(event.type);
    if (event.type === "watching" && types.length === 1) await session.files.write("first.txt", "1");
    if (event.type === "create" && event.path === "first.txt") await session.process("exec sleep 600");
    if (event.type === "gap") await session.files.write("last.txt", "2");
    if (event.type === "create" && event.path === "last.txt") break;
  }
  assert.deepEqual(types.slice(0, 5), ["watching", "create", "overflow", "watching", "gap"]);
});

test("'.' is the working directory", async () => {
  await using session = await era.session("python", options);
  await session.files.write("d/file.txt", "1");
  assert.deepEqual((await session.files.list({ prefix: "." })).map(({ path }) => path), ["d/file.txt"]);
  assert.equal((await session.files.stat(".")).type, "dir");
});

test("cells share variables", async () => {
  await using session = await era.session("python", options);
  const main = session.context();
  await main.run("x = 40");
  const cell = await main.run("print('x is', x)\nx + 2", { timeout: 10 });
  assert.equal(cell.stdout, "x is 40\n");
  assert.equal(cell.results?.at(-1)?.data["text/plain"], "42");
  assert.equal((await main.run("1/0")).error?.name, "ZeroDivisionError");
  const events = await all(main.stream("print(x)")); // what is printed may come in more than one piece
  assert.equal(events.map((event) => event.type === "stdout" ? event.content : event.type).join(""), "40\ndone");
  assert.deepEqual((await session.contexts()).map(({ name }) => name), ["main"]);
  assert.equal(await main.interrupt(), false);
  const sleeping = main.run("import time\nprint('in', flush=True)\ntime.sleep(600)");
  while (!(await main.interrupt())) { /* soon */ }
  assert.equal((await sleeping).error?.name, "KeyboardInterrupt");
  assert.equal((await main.restart()).name, "main");
  assert.equal((await main.run("x")).error?.name, "NameError");
  await main.delete();
  assert.deepEqual(await session.contexts(), []);
  await assert.rejects(session.context("none").restart(), NotFound);
});

test("a ticket, and the runs of all sessions", async () => {
  await using session = await era.session("python", options);
  assert.match((await session.ticket()).ticket, /^tkt_/);
  const began = new Date().toISOString();
  await session.run("pass");
  await session.run("raise SystemExit(3)");
  const failed = await all(era.runs({ session: session.id, status: "failed", since: began, limit: 1 }));
  assert.deepEqual(failed.map(({ exit_code }) => exit_code), [3]);
  assert.equal((await all(era.runs({ session: session.id, limit: 1 }))).length, 2);
});

test("the output of a process goes on where its connection broke", async () => {
  await using session = await era.session("python", options);
  const process = await session.process("for n in $(seq 300); do echo line $n; done");
  await process.wait();
  await using proxy = new HangingUp(/\/events/, [300, 0, 700]);
  const through = await client({ url: await proxy.start() }).sessions.get(session.id);
  const events = await all(through.processes.get(process.id).events());
  const expected = Array.from({ length: 300 }, (_, n) => `line ${n + 1}\n`).join("");
  assert.equal(text(events, "stdout"), expected);
  assert.equal(proxy.matched, 4);
});

test("a terminal tells of gaps, and of what is refused", async () => {
  await using session = await era.session("python", options);
  const long = await session.process("head -c 3000000 /dev/zero | tr '\\0' x");
  await long.wait();
  let missing = 0;
  await using ended = await long.attach({ onGap: (gap) => missing += gap.to - gap.from + 1 });
  const kept = (await all(ended)).reduce((sum, bytes) => sum + bytes.length, 0);
  assert.ok(missing > 0);
  assert.equal(kept + missing, 3_000_000);
  const deaf = await session.process(["sleep", "60"]);
  await using controller = await deaf.attach();
  controller.write("x");
  await assert.rejects(all(controller), (error) => error instanceof Conflict && error.code === "no_input");
  await deaf.signal("TERM");
  await all(controller);
  assert.equal(controller.exit?.signal, "TERM");
});

test("what was listened to leaves nothing at the caller's signal", async () => {
  await using session = await era.session("python", options);
  const { signal } = new AbortController();
  let listeners = 0;
  const { addEventListener, removeEventListener } = signal;
  signal.addEventListener = (...words: Parameters<typeof addEventListener>) => {
    listeners++;
    addEventListener.apply(signal, words);
  };
  signal.removeEventListener = (...words: Parameters<typeof removeEventListener>) => {
    listeners--;
    removeEventListener.apply(signal, words);
  };
  await all(session.stream("print(1)", { signal }));
  assert.equal(listeners, 0);
  await (await session.files.archive("tar", { signal })).body?.cancel();
  assert.equal(listeners, 0);
  const process = await session.process(["true"]);
  await all(await process.attach({ signal }));
  assert.equal(listeners, 0);
});

test("a terminal", async () => {
  await using session = await era.session("python", options);
  await using terminal = await session.terminal({ cols: 91, rows: 31 });
  terminal.write("stty size; exit 5\n");
  let screen = "";
  for await (const bytes of terminal) screen += new TextDecoder().decode(bytes);
  assert.match(screen, /31 91/);
  assert.equal(terminal.exit?.exit_code, 5);
  assert.match(terminal.processId ?? "", /^proc_/);
  const sorting = await session.process(["sort"], { stdin: true });
  await using pipe = await sorting.attach();
  pipe.write("pear\napple\n");
  pipe.closeInput();
  assert.equal((await all(pipe)).map((bytes) => new TextDecoder().decode(bytes)).join(""), "apple\npear\n");
  const shell = await session.process(["sh"], { pty: { cols: 80, rows: 24 } });
  await shell.resize({ cols: 100, rows: 40 });
  await using again = await shell.attach();
  again.resize({ cols: 101, rows: 41 });
  again.write("stty size; exit\n");
  screen = "";
  for await (const bytes of again) screen += new TextDecoder().decode(bytes);
  assert.match(screen, /41 101/);
});
