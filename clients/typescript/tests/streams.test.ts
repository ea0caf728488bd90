/** Streams whose connections break: nothing is missed, nothing comes twice. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { type RunEvent, type Session, StreamCut } from "era-sessions";
import { all, client, HangingUp, lines } from "./support.ts";

const CODE = lines(
  "import sys, time",
  "for n in range(40):",
  "    print('süß', n, 'x' * 100, flush=True)",
  "    print('🎉', n, 'x' * 100, file=sys.stderr, flush=True)",
  "    time.sleep(0.01)",
  "sys.exit(3)",
);

/** Long enough for all cuts, in however few pieces it comes. */
const expected = (word: string): string =>
  Array.from({ length: 40 }, (_, n) => `${word} ${n} ${"x".repeat(100)}\n`).join("");

function text(events: RunEvent[], type: "stdout" | "stderr"): string {
  return events.map((event) => (event.type === type ? event.content : "")).join("");
}

/** A session that is reached through a proxy which hangs up on its streams. */
async function through(proxy: HangingUp, session: Session, retries = 2): Promise<Session> {
  return client({ url: await proxy.start(), retries }).sessions.get(session.id);
}

test("a stream goes on where it broke", async () => {
  await using session = await client().session("python");
  for (const cuts of [[0], [250], [400, 250, 300], [1000, 0, 600, 1], [777, 777, 777, 777, 777]]) {
    await using proxy = new HangingUp(/\/stream|\/events/, cuts);
    const stream = (await through(proxy, session)).stream(CODE);
    const events = await all(stream);
    assert.equal(text(events, "stdout"), expected("süß"), `cut after ${cuts}`);
    assert.equal(text(events, "stderr"), expected("🎉"), `cut after ${cuts}`);
    const last = events.at(-1);
    assert.ok(last?.type === "done" && last.exit_code === 3 && last.run_id === stream.runId);
    assert.equal(events.filter(({ type }) => type === "done").length, 1);
    assert.equal(proxy.matched, cuts.length + 1);
  }
  assert.equal((await session.runs.list()).length, 5);
});

test("a stream without a session ends its program where it is left, and says so where it breaks", async () => {
  const code = lines(
    "import os, signal, time, era_storage",
    "def end(*_):",
    "    era_storage.kv.set('ends', os.environ['NAME'], 'told')",
    "    os._exit(0)",
    "signal.signal(signal.SIGTERM, end)",
    "print('on', flush=True)",
    "time.sleep(300)",
  );
  const told = client().storage.kv("ends");
  for await (const event of client().stream("python", code, { timeout: 300, env: { NAME: "left" } })) {
    assert.ok(event.type === "stdout" && event.content === "on\n");
    break;
  }
  await using proxy = new HangingUp(/execute/, [230]);
  const cut = client({ url: await proxy.start() }).stream("python", code, { timeout: 300, env: { NAME: "cut" } });
  await assert.rejects(cut.done(), (error) => error instanceof StreamCut && error.runId === undefined);
  assert.equal(proxy.matched, 1);
  for (const name of ["left", "cut"]) {
    for (let n = 0; n < 1000 && (await told.get(name)) === undefined; n++) {
      await new Promise((go) => setTimeout(go, 30));
    }
    assert.equal(await told.get(name), "told");
  }
});

test("a setup is followed to its end, whatever breaks", async () => {
  const setup = { commands: ["for n in $(seq 40); do echo line $n; sleep 0.01; done"] };
  await using session = await client().session("python", { setup });
  const cuts = [300, 0, 500, 250, 900];
  await using proxy = new HangingUp(/\/setup\/events/, cuts);
  const events = await all((await through(proxy, session)).setup.events());
  const last = events.at(-1);
  assert.ok(last?.type === "done" && last.setup_status === "completed" && last.setup_result.success);
  const told = events.flatMap((event) => (event.type === "line" ? [event.text] : [])).filter((text) =>
    /^line/.test(text)
  );
  assert.deepEqual(told, last.setup_result.stdout.match(/^line \d+$/gm)?.filter((line) => told.includes(line)));
  // Once the setup has ended, the server keeps its last event only, and says so: 2 of its status, 1 command, 40 lines.
  const sizes = events.slice(0, -1).map((event) => (event.type === "gap" ? event.to - event.from + 1 : 1));
  assert.equal(sizes.reduce((sum, size) => sum + size, 0), 43);
  assert.equal(proxy.matched, cuts.length + 1);
});

test("events of a run can be followed from any of them on", async () => {
  await using session = await client().session("python");
  const run = await session.background(CODE);
  await using proxy = new HangingUp(/\/events/, [500, 900]);
  const events = await all((await through(proxy, session)).runs.get(run.id).events({ data: false }));
  assert.equal(text(events, "stdout"), expected("süß"));
  assert.ok(!("data" in (events.at(-1) ?? {})));
  const rest = await all(run.events({ after: events.length - 3 }));
  assert.deepEqual(rest.slice(0, 2), events.slice(-3, -1));
});

test("a server that sends heartbeats isn't away, and a proxy's or its own 503 is a cut", async () => {
  const event = (id: number, fields: object): string => `id: ${id}\ndata: ${JSON.stringify(fields)}\n\n`;
  const busy = JSON.stringify({ error: "No.", code: "unavailable", hint: "Wait.", request_id: "req_1" });
  const answers: [number, string][] = [
    [200, '{"id": "s"}'],
    [200, event(1, { type: "stdout", content: "a" })],
    [502, "Bad gateway"],
    [502, "Bad gateway"],
    [200, ": heartbeat\n\n"],
    [503, busy],
    [200, ": heartbeat\n\n"],
    [200, event(2, { type: "done" })],
  ];
  let later = 0;
  const now = Date.now;
  Date.now = () => now() + later;
  try {
    const fetch = (): Promise<Response> => {
      later += 25_000;
      const [status, body] = answers.shift() ?? [500, ""];
      const headers = { "content-type": "text/event-stream" };
      return Promise.resolve(new Response(body, { status, headers }));
    };
    const run = (await client({ fetch, retries: 1 }).sessions.get("s")).runs.get("r");
    assert.deepEqual((await all(run.events())).map(({ type }) => type), ["stdout", "done"]);
  } finally {
    Date.now = now;
  }
  assert.equal(answers.length, 0);
});

test("without retries a cut stream is an error that names the run", async () => {
  await using session = await client().session("python");
  await using proxy = new HangingUp(/\/stream/, [400]);
  const stream = (await through(proxy, session, 0)).stream(CODE);
  await assert.rejects(all(stream), (error: Error) => {
    assert.ok(error instanceof StreamCut);
    assert.deepEqual([error.code, error.runId], ["stream_cut", stream.runId]);
    return true;
  });
  assert.equal((await session.runs.get(stream.runId ?? "").wait()).exit_code, 3);
});

test("what isn't kept any more comes as a gap", async () => {
  await using session = await client().session("python");
  const first = (await session.run("print('first')")).run_id;
  await session.run("print('second')"); // the server keeps the output of one run
  const events = await all(session.runs.get(first).events());
  assert.deepEqual(events.map(({ type }) => type), ["gap", "done"]);
});
