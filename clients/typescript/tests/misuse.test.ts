/** What goes wrong on the way: the right error, what to do, and never anything of the key. */

import assert from "node:assert/strict";
import { createServer } from "node:net";
import { test } from "node:test";
import { inspect } from "node:util";
import {
  AnswerTimeout,
  BadRequest,
  ConnectionLost,
  Era,
  EraError,
  Forbidden,
  HomeLost,
  NotEra,
  OutcomeUnknown,
  ServerAway,
  TooManyWaiting,
  Unauthorized,
} from "era-sessions";
import { all, client, closedAddress, HangingUp, KEY, lines, URL_ } from "./support.ts";

const WRONG = "era_wrong-secret-4711";

/** The error of a call that must fail. It is an error of ours that says what to do, and shows no key. */
async function failure(call: () => Promise<unknown>): Promise<EraError> {
  try {
    await call();
  } catch (error) {
    assert.ok(error instanceof EraError, inspect(error));
    assert.ok(error.hint.length > 0, inspect(error));
    const shown = inspect(error, { depth: 20, showHidden: true, getters: true }) + JSON.stringify(error) + error.stack;
    for (const secret of [WRONG, KEY ?? WRONG]) assert.ok(!shown.includes(secret), `shows ${secret}`);
    return error;
  }
  throw new assert.AssertionError({ message: "the call did not fail" });
}

test("a wrong key, and none", async () => {
  for (const era of [client({ apiKey: WRONG }), new Era({ url: URL_ })]) {
    const error = await failure(() => era.session("python"));
    assert.ok(error instanceof Unauthorized);
    assert.deepEqual([error.status, error.code], [401, "unauthorized"]);
    assert.match(error.requestId ?? "", /^req_/);
    assert.ok(!inspect(era, { depth: 20, showHidden: true }).includes(WRONG));
    assert.ok(!JSON.stringify(era).includes(WRONG));
  }
});

test("what can't be a key or an address is refused without being shown", () => {
  for (const apiKey of [`${WRONG}\n`, `${WRONG} `, "süß", ""]) {
    assert.throws(
      () => client({ apiKey }),
      (error: Error) => error instanceof TypeError && !inspect(error).includes(WRONG),
    );
  }
  for (
    const url of [`http://user:${WRONG}@127.0.0.1:1`, "127.0.0.1:1", "file:///etc/passwd", `http://h/?key=${WRONG}`]
  ) {
    assert.throws(
      () => client({ url }),
      (error: Error) => error instanceof TypeError && !inspect(error).includes(WRONG),
    );
  }
  assert.equal(client({ url: "http://127.0.0.1:1/below///" }).url, "http://127.0.0.1:1/below");
});

test("a key of an owner is no operator's", async () => {
  const { id, key } = await client().keys.create("mina", "a test");
  const mina = client({ apiKey: key });
  assert.ok((await failure(() => mina.keys.list())) instanceof Forbidden);
  assert.deepEqual((await client().keys.list()).map(({ owner }) => owner), ["mina"]);
  await client().keys.revoke(id);
  assert.ok((await failure(() => mina.session("python"))) instanceof Unauthorized);
});

test("no server", async () => {
  const away = client({ url: await closedAddress(), retries: 1 });
  const error = await failure(() => away.session("python"));
  assert.ok(error instanceof ServerAway);
  assert.ok(error.message.includes(away.url));
  assert.match(error.hint, /era serve/);
  assert.ok((await failure(() => all(away.sessions.iterate()))) instanceof ServerAway);
  assert.ok((await failure(() => client({ url: "http://no-such-host.invalid" }).health())) instanceof ServerAway);
});

test("another server, and one that says nothing", async () => {
  const answers = [
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html",
    "HTTP/1.1 502 Bad\r\ncontent-length: 3\r\n\r\nbad",
    "",
  ];
  for (const [answer, expected] of [[0, NotEra], [1, NotEra], [2, AnswerTimeout]] as const) {
    const sockets = new Set<{ destroy(): void }>();
    const server = createServer((socket) => {
      sockets.add(socket);
      socket.on("error", () => undefined);
      socket.on("data", () => answers[answer] && socket.end(answers[answer]));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as { port: number };
    const era = client({ url: `http://127.0.0.1:${port}`, requestTimeout: 0.3, retries: 0 });
    const error = await failure(() => era.health());
    assert.ok(error instanceof expected, inspect(error));
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => server.close(resolve));
  }
});

test("what could only be later than the caller waits isn't asked for again", async () => {
  let asked = 0;
  const sockets = new Set<{ destroy(): void }>();
  const body = JSON.stringify({ error: "No.", code: "too_busy", hint: "Come back.", request_id: "req_1" });
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => undefined);
    socket.on("data", () => {
      asked += 1;
      const head = `HTTP/1.1 503 Later\r\nretry-after: 20\r\ncontent-length: ${body.length}\r\nconnection: close`;
      socket.end(`${head}\r\n\r\n${body}`);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as { port: number };
  const error = await failure(() => client({ url: `http://127.0.0.1:${port}`, requestTimeout: 19 }).health());
  for (const socket of sockets) socket.destroy();
  assert.deepEqual([error.status, error.retryAfter, asked], [503, 20, 1]);
  await new Promise((resolve) => server.close(resolve));
});

test("a change may take longer than other calls: it waits for the run under way", async () => {
  const sent: string[] = [];
  const slow: typeof fetch = (url, init) =>
    new Promise((resolve, reject) => {
      sent.push(`${init?.method} ${new URL(String(url)).pathname}`);
      init?.signal?.addEventListener("abort", () => reject(new Error("given up")));
      setTimeout(() => resolve(Response.json({ id: "x" })), init?.method === "GET" ? 0 : 600);
    });
  const session = await client({ fetch: slow, requestTimeout: 0.3, retries: 0 }).sessions.get("x");
  await Promise.all([session.files.remove("a"), session.setup.again(), session.rollback(1), session.data.replace({})]);
  assert.equal(sent.length, 5);
});

test("who waits for a run waits for a server that restarts, once it has been there", async () => {
  const answers: unknown[] = [];
  const fetch = (): Promise<Response> => {
    const next = answers.shift();
    const refused = Object.assign(new Error("refused"), { code: "ECONNREFUSED" });
    return next === undefined
      ? Promise.reject(new TypeError("fetch failed", { cause: refused }))
      : Promise.resolve(Response.json(next));
  };
  const wait = async (retries: number) =>
    (await client({ fetch, retries, requestTimeout: 20 }).sessions.get("x")).runs.get("r").wait();
  answers.push({ id: "x" }, { status: "running" }, undefined, undefined, undefined, undefined, { status: "ok" });
  assert.equal((await wait(1)).status, "ok");
  answers.push({ id: "x" }, { status: "running" });
  assert.ok((await failure(() => wait(0))) instanceof ConnectionLost); // the server was asked, and answered
  answers.push({ id: "x" });
  assert.ok((await failure(() => wait(0))) instanceof ServerAway);
});

test("what a host or a database that was lost may have done is asked for again only with a key", async () => {
  for (
    const [code, Lost, extra] of [
      ["home_lost", HomeLost, ""],
      ["home_lost", HomeLost, "retry-after: 1\r\n"],
      ["outcome_unknown", OutcomeUnknown, ""],
    ] as const
  ) {
    const keys: (string | undefined)[] = [];
    const body = JSON.stringify({ error: "No.", code, hint: "Look.", request_id: "req_1" });
    const head = `HTTP/1.1 503 Lost\r\n${extra}content-length: ${body.length}\r\nconnection: close`;
    const server = createServer((socket) => {
      socket.on("error", () => undefined);
      socket.once("data", (data) => {
        keys.push(/^idempotency-key: (.+)\r$/im.exec(String(data))?.[1]);
        socket.end(`${head}\r\n\r\n${body}`);
      });
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as { port: number };
    const era = client({ url: `http://127.0.0.1:${port}`, retries: 1 });
    for (const call of [() => era.webhooks.create("http://a.example/"), () => era.execute("python", "1")]) {
      assert.ok((await failure(call)) instanceof Lost);
    }
    assert.deepEqual(keys, [undefined, undefined]);
    assert.ok((await failure(() => era.session("python"))) instanceof Lost);
    assert.equal(keys.length, 4);
    assert.ok(keys[2] !== undefined && keys[2] === keys[3]);
    await new Promise((resolve) => server.close(resolve));
  }
});

test("a caller gives up", async () => {
  const era = client();
  await using session = await era.session("python");
  const controller = new AbortController();
  const reason = new Error("enough");
  const stream = session.stream("import time; print(1, flush=True); time.sleep(600)", {
    timeout: 600,
    signal: controller.signal,
  });
  await assert.rejects(async () => {
    for await (const event of stream) {
      assert.equal(event.type, "stdout");
      controller.abort(reason);
    }
  }, reason);
  const stopped = await session.runs.get(stream.runId ?? "").record();
  assert.deepEqual([stopped.status, (await session.runs.list()).length], ["killed", 1]);
  await assert.rejects(session.run("print(1)", { signal: AbortSignal.abort(reason) }), reason);
  await assert.rejects(session.run("import time; time.sleep(1)", { signal: AbortSignal.timeout(50) }), {
    name: "TimeoutError",
  });
  const slow = await failure(() => session.run("import time; time.sleep(2)", { requestTimeout: 0.1 }));
  assert.ok(slow instanceof AnswerTimeout);
});

test("a run whose caller gives up is stopped", async () => {
  for (const retries of [0, 2]) {
    await using session = await client({ retries }).session("python");
    for (const options of [{ code: "import time; time.sleep(600)" }, { command: "sleep 600" }]) {
      const { code, ...rest } = options as { code?: string; command?: string };
      const controller = new AbortController();
      const reason = new Error("enough");
      const before = (await session.runs.list()).length;
      const running = session.run(code, { ...rest, timeout: 600, signal: controller.signal });
      const rejected = assert.rejects(running, reason);
      while ((await session.runs.list()).length === before);
      controller.abort(reason);
      await rejected;
      assert.equal((await session.runs.list())[0]?.status, "killed");
    }
  }
});

test("arguments that can't be are named", async () => {
  await using session = await client().session("python");
  for (const options of [{ timeout: "abc" }, { stdin: new Uint8Array([1]) }]) {
    const [name] = Object.keys(options);
    const error = await failure(() => session.run("1", options as object));
    assert.ok(error instanceof BadRequest, inspect(error));
    assert.match(error.message, new RegExp(`'${name}'`));
  }
  assert.deepEqual(await session.runs.list(), []);
});

test("too many wait: an error, or patience", async () => {
  await using session = await client().session("python");
  const impatient = await client({ retries: 0 }).sessions.get(session.id);
  // The server lets one wait. Of three, one runs, one waits, and one is refused.
  const code = "import time; time.sleep(1.5)";
  const results = await Promise.allSettled([1, 2, 3].map(() => impatient.run(code)));
  const [refused] = results.filter((result) => result.status === "rejected");
  assert.ok(refused?.reason instanceof TooManyWaiting, inspect(results));
  assert.deepEqual([refused.reason.status, refused.reason.retryAfter], [429, 1]);
  const patient = await client({ retries: 20 }).sessions.get(session.id);
  const done = await Promise.all([1, 2, 3].map(() => patient.run("import time; time.sleep(0.2)")));
  assert.deepEqual(done.map(({ status }) => status), ["ok", "ok", "ok"]);
});

test("a lost answer is asked for again, and the run is run once", async () => {
  await using session = await client().session("python", { data: { n: 0 } });
  const count = lines(
    "import json",
    "data = json.load(open('.session_data.json'))",
    "data['n'] += 1",
    "json.dump(data, open('.session_data.json', 'w'))",
    "print(data['n'])",
  );
  await using proxy = new HangingUp(/^POST .*\/run /, [0, 40]);
  const cut = await client({ url: await proxy.start() }).sessions.get(session.id);
  assert.equal((await cut.run(count)).stdout, "1\n");
  assert.equal(proxy.matched, 3);
  assert.equal((await session.runs.list()).length, 1);
});

test("sessions are made once, and what reads is asked again", async () => {
  await using proxy = new HangingUp(/^(POST|GET) \/api\/sessions/, [0, 0, 30]);
  const era = client({ url: await proxy.start(), retries: 3 });
  const session = await era.session("python", { metadata: { made: "once" } });
  assert.equal((await all(client().sessions.iterate({ metadata: { made: "once" } }))).length, 1);
  await session.delete();
});

test("a call that may have been carried out isn't made again", async () => {
  await using session = await client().session("python");
  // Behind its head. Before that, Deno's fetch makes a call of any kind again by itself, on a new connection.
  await using proxy = new HangingUp(/rollback/, [300]);
  const cut = await client({ url: await proxy.start() }).sessions.get(session.id);
  assert.ok((await failure(() => cut.rollback(1))) instanceof ConnectionLost);
  assert.equal(proxy.matched, 1);
});

test("what Node gives up says how a run that takes longer is followed", async () => {
  let asked = 0;
  const fetch = (): Promise<Response> => {
    asked += 1;
    const late = Object.assign(new Error("Headers Timeout Error"), { code: "UND_ERR_HEADERS_TIMEOUT" });
    return Promise.reject(new TypeError("fetch failed", { cause: late }));
  };
  const error = await failure(() => new Era({ url: URL_, fetch }).execute("python", "1"));
  assert.ok(error instanceof ConnectionLost);
  assert.match(error.hint, /300 seconds.*stream\(\)/);
  assert.equal(asked, 1); // it may have been executed
});
