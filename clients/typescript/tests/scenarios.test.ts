/** The scenarios that every client of the API must run with the same results (tests/sdk/scenarios.json says how). */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import process from "node:process";
import { test } from "node:test";
import { inspect } from "node:util";
import { bytesOf as bytesWritten, type Era, EraError, type ProcessEvent, type Session } from "era-sessions";
import { fromBase64, toBase64 } from "#built/base64.js";
import { all, client } from "./support.ts";

type Args = Record<string, any>;

interface Step {
  call: string;
  on?: string;
  args?: Args;
  expect?: unknown;
  error?: string;
  save?: Record<string, string[]>;
}

const file = process.env["ERA_TEST_SCENARIOS"] ?? "";
const { scenarios } = JSON.parse(readFileSync(file, "utf-8")) as { scenarios: { name: string; steps: Step[] }[] };

const bytesOf = (
  content: any,
) => (typeof content === "string" ? new TextEncoder().encode(content) : fromBase64(content.base64));
const shown = (content: Uint8Array | undefined) => (content === undefined ? null : { base64: toBase64(content) });

/** Calls in which no session takes part, or that are about one which may not be there. */
const OF_SERVER: Record<string, (era: Era, args: Args, on: string) => Promise<unknown>> = {
  "sessions.create": async (era, { language, ...rest }) => (await era.session(language, rest)).info,
  "sessions.get": async (era, _, on) => (await era.sessions.get(on)).info,
  "sessions.list": async (era, args) => ({ sessions: await all(era.sessions.iterate(args)) }),
  "sessions.update": async (era, args, on) => (await era.sessions.get(on)).update(args),
  "sessions.delete": async (era, _, on) => era.sessions.delete(on),
  "sessions.restore": async (era, _, on) => (await era.sessions.restore(on)).info,
  execute: (era, { language, code, ...rest }) => era.execute(language, code, rest),
  "execute.stream": async (era, { language, code, ...rest }) => collected(await all(era.stream(language, code, rest))),
  "kv.set": (era, { namespace, key, value, metadata }) => era.storage.kv(namespace).set(key, value, metadata),
  "kv.get": async (era, { namespace, key }) => (await era.storage.kv(namespace).get(key)) ?? null,
  "webhooks.create": (era, { url, ...options }) => era.webhooks.create(url, options),
  "webhooks.deliveries": (era, { id }) => era.webhooks.deliveries(id),
  "webhooks.replay": (era, { id, delivery_id }) => era.webhooks.replay(id, delivery_id),
  "webhooks.delete": (era, { id }) => era.webhooks.delete(id),
  audit: (era, filter) => all(era.audit(filter)),
  "kv.list": (era, { namespace, ...filter }) => all(era.storage.kv(namespace).list(filter)),
  "kv.delete": (era, { namespace, key }) => era.storage.kv(namespace).delete(key),
  "d1.exec": (era, { namespace, sql, params }) => era.storage.d1(namespace).exec(sql, params),
  "d1.query": async (era, { namespace, sql, params }) => (await era.storage.d1(namespace).query(sql, params)).results,
  "r2.put": (era, { namespace, key, content }) => era.storage.r2(namespace).put(key, bytesOf(content)),
  "r2.get": async (era, { namespace, key }) => shown(await era.storage.r2(namespace).get(key)),
  "r2.list": (era, { namespace, ...filter }) => all(era.storage.r2(namespace).list(filter)),
};

const OF_SESSION: Record<string, (session: Session, args: Args, era: Era) => Promise<unknown>> = {
  run: (session, { code, ...rest }) => session.run(code, rest),
  stream: async (session, { code, ...rest }) => collected(await all(session.stream(code, rest))),
  background: async (session, { code, ...rest }) => ({
    run_id: (await session.background(code, rest)).id,
    status: "running",
  }),
  "data.get": (session, { key }) => session.data.get(key),
  "data.all": (session) => session.data.all(),
  "data.set": (session, { key, value }) => session.data.set(key, value),
  "data.delete": (session, { key }) => session.data.delete(key),
  "code.get": (session) => session.code(),
  "code.set": (session, { code, description }) => session.setCode(code, description),
  "files.write": (session, { path, content }) => session.files.write(path, bytesOf(content)),
  "files.read": async (session, { path }) => shown(await session.files.read(path)),
  "files.list": async (session, args) => counted("files", await session.files.list(args)),
  "files.delete": async (session, { path, ...rest }) => {
    await session.files.remove(path, rest);
    return { success: true };
  },
  "versions.list": async (session) => counted("versions", await session.versions.list()),
  "versions.get": (session, { version }) => session.versions.get(version),
  "versions.diff": (session, { version }) => session.versions.diff(version),
  rollback: (session, { version, stop = false }) => session.rollback(version, { stop }),
  duplicate: async (session, args) => (await session.duplicate(args)).info,
  "runs.list": async (session) => counted("runs", await session.runs.list()),
  "runs.get": (session, { run_id }) => session.runs.get(run_id).record(),
  "runs.wait": (session, { run_id }) => session.runs.get(run_id).wait(),
  "runs.stop": (session, { run_id }) => session.runs.get(run_id).stop(),
  "runs.output": async (session, { run_id }) => shown(await session.runs.get(run_id).output("stdout")),
  "setup.wait": async (session) => {
    const setup_result = await session.setup.wait();
    return { setup_result, setup_status: (await session.refresh()).setup_status };
  },
  "processes.start": async (session, { command, ...rest }) => (await session.process(command, rest)).info(),
  "processes.list": async (session) => counted("processes", await session.processes.list()),
  "processes.signal": (session, { process, signal }) => session.processes.get(process).signal(signal),
  "processes.output": async (session, { process }) => written(await all(session.processes.get(process).events())),
  "processes.talk": async (session, { process: id, input }) => {
    const process = session.processes.get(id);
    await process.write(input);
    await process.closeInput();
    return written(await all(process.events()));
  },
  "processes.stop": (session, { process }) => session.processes.get(process).end(),
  checkpoint: (session) => session.checkpoint(),
  "sessions.stop": (session) => session.stop(),
  cell: (session, { context, code, ...rest }) => session.context(context).run(code, rest),
  "contexts.list": async (session) => counted("contexts", await session.contexts()),
  "contexts.interrupt": async (session, { context }) => ({ interrupted: await session.context(context).interrupt() }),
  "contexts.restart": (session, { context }) => session.context(context).restart(),
  "contexts.delete": async (session, { context }) => {
    await session.context(context).delete();
    return { success: true };
  },
  host: async (session, { port }) => ({ url: await session.proxyUrl(port), port }),
  "inbox.get": (session) => session.inbox.get(),
  "inbox.set": (session, args) => session.inbox.set(args),
  "inbox.deliveries": async (session) => counted("deliveries", await all(session.inbox.deliveries())),
  "inbox.delete": async (session) => {
    await session.inbox.delete();
    return { success: true };
  },
  move: async (session, args, era) => {
    const capsule = await (await session.export()).arrayBuffer();
    return (await era.sessions.import_(capsule, args)).info;
  },
};

/** The answer that a run's events add up to. */
function collected(events: { type: string; content?: string }[]): Record<string, unknown> {
  const text = (type: string) => events.map((event) => (event.type === type ? event.content : "")).join("");
  return { ...events.at(-1), stdout: text("stdout"), stderr: text("stderr") };
}

/** What a process wrote to its standard output, and how it ended. */
function written(events: ProcessEvent[]): Record<string, unknown> {
  const last = events.at(-1);
  assert.ok(last?.type === "exit");
  const stdout = events.map((event) => (event.type === "stdout" ? new TextDecoder().decode(bytesWritten(event)) : ""));
  return { stdout: stdout.join(""), exit_code: last.exit_code };
}

function counted(name: string, items: unknown[]): Record<string, unknown> {
  return { [name]: items, count: items.length };
}

/** `value` with names filled in, in all its strings. */
function filled<T>(value: T, prefix: string, saved: Record<string, string>): T {
  const text = JSON.stringify(value).replaceAll("@S", prefix).replace(
    /\$([A-Z]+)/g,
    (whole, name) => saved[name] ?? whole,
  );
  return JSON.parse(text) as T;
}

function isPart(expected: any, actual: any): boolean {
  if (typeof expected === "string") {
    const pattern = expected.split("…").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join(".*");
    return typeof actual === "string" && new RegExp(`^(?:${pattern})$`, "s").test(actual);
  }
  if (Array.isArray(expected)) {
    return Array.isArray(actual) && actual.length === expected.length &&
      expected.every((item, at) => isPart(item, actual[at]));
  }
  if (typeof expected === "object" && expected !== null) {
    const isObject = typeof actual === "object" && actual !== null;
    return isObject && Object.keys(expected).every((name) => name in actual && isPart(expected[name], actual[name]));
  }
  return expected === actual;
}

async function take(era: Era, { call, on = "", args = {} }: Step): Promise<unknown> {
  const ofServer = OF_SERVER[call];
  if (ofServer) return ofServer(era, args, on);
  const ofSession = OF_SESSION[call];
  assert.ok(ofSession, `the client has no call ${call}`);
  return ofSession(await era.sessions.get(on), args, era);
}

for (const { name, steps } of scenarios) {
  test(name, async () => {
    const era = client();
    const prefix = `t${crypto.randomUUID().slice(0, 8)}`;
    const saved: Record<string, string> = {};
    for (const written of steps) {
      const step = filled(written, prefix, saved);
      let value: any;
      let error: string | undefined;
      try {
        value = await take(era, step);
      } catch (problem) {
        if (!(problem instanceof EraError)) throw problem;
        error = problem.code;
      }
      assert.equal(error, step.error, `${step.call}: ${inspect(value)}`);
      if ("expect" in step) assert.ok(isPart(step.expect, value), `${step.call} gives ${inspect(value, { depth: 9 })}`);
      for (const [key, path] of Object.entries(step.save ?? {})) {
        saved[key] = path.reduce((at, part) => at[part], value);
      }
    }
  });
}
