/** Runs: their options, their streams, their records, and those in the background. */

import { type CallOptions, once, type OnceOptions, RUN_HEADER, sleep, type Transport } from "./http.js";
import { collect, pages } from "./pages.js";
import { part } from "./paths.js";
import { follow, type Gap } from "./streams.js";
import type { Answer, Data, RunBody, RunRecord, RunResult } from "./types.js";

/** What a run takes besides its code: `command`, `args`, `stdin`, `cwd`, `env`, `secrets`, `timeout`, `atomic`. */
export interface RunOptions extends Partial<Omit<RunBody, "code" | "background">>, OnceOptions {
  /** False leaves the session's data out of the answer. It may be large. */
  data?: boolean;
}

/** The end of a run: what its answer has besides the output, which came before. `data` may not be kept any more. */
export type Done = { type: "done"; data?: Data } & Omit<RunResult, "stdout" | "stderr" | "data">;
export type Output = { type: "stdout" | "stderr"; content: string };
/** What a stream gives: output as it is written, and at the end how the run ended. */
export type RunEvent = Output | Gap | Done;

const FIRST_LOOK = 0.05;
const LAST_LOOK = 2;

/**
 * A run as it happens: `for await (const event of stream)`. Leaving the loop stops listening, not the run: `stop()` does
 * that. A stream can be read once.
 */
export class RunStream implements AsyncIterable<RunEvent> {
  /** Names the run, once it has begun. */
  runId: string | undefined;
  readonly #transport: Transport;
  readonly #path: string;
  readonly #events: AsyncGenerator<RunEvent, void, undefined>;

  constructor(transport: Transport, path: string, json: object, data: boolean | undefined, options: OnceOptions) {
    this.#transport = transport;
    this.#path = path;
    const headers = once(transport, options);
    const plan = {
      begin: { method: "POST", path: `${path}/stream`, query: { data }, json, headers, endless: true },
      resume: (after: number) => (this.runId === undefined ? undefined : eventsOf(path, this.runId, { after, data })),
      last: "done",
    } as const;
    this.#events = follow<RunEvent>(transport, plan, options, (response) => {
      this.runId = response.headers.get(RUN_HEADER) ?? undefined;
    });
  }

  [Symbol.asyncIterator](): AsyncGenerator<RunEvent, void, undefined> {
    return this.#events;
  }

  /** Read on to the end. */
  async done(): Promise<Done> {
    let last: RunEvent | undefined;
    for await (const event of this.#events) last = event;
    if (last?.type !== "done") throw new TypeError("This stream has been read already.");
    return last;
  }

  /** Stop the run, which the stream then tells of. */
  async stop(options: CallOptions = {}): Promise<RunRecord | undefined> {
    if (this.runId === undefined) return undefined;
    return new Run(this.#transport, this.#path, this.runId).stop(options);
  }
}

/** One run of a session, whether it goes on or has ended. */
export class Run {
  readonly #transport: Transport;
  readonly #session: string;
  readonly #path: string;

  constructor(
    transport: Transport,
    session: string,
    readonly id: string,
  ) {
    this.#transport = transport;
    this.#session = session;
    this.#path = `${session}/runs/${part(id)}`;
  }

  /** Its record, with how it ended once it has. */
  record(options: CallOptions = {}): Promise<RunRecord> {
    return this.#transport.json({ method: "GET", path: this.#path }, options);
  }

  /** Wait until it has ended. */
  async wait(options: CallOptions = {}): Promise<RunRecord> {
    for (let seconds = FIRST_LOOK;; seconds = Math.min(2 * seconds, LAST_LOOK)) {
      const record = await this.record(options);
      if (record.status !== "running") return record;
      await sleep(seconds, options.signal);
    }
  }

  /** Stop it: SIGTERM, and SIGKILL two seconds later. A run that has ended stays as it is. */
  stop(options: CallOptions = {}): Promise<RunRecord> {
    return this.#transport.json({ method: "DELETE", path: this.#path, repeatable: true, endless: true }, options);
  }

  /** What it has written so far, as text; bytes that aren't UTF-8 become U+FFFD. */
  async stdout(options: CallOptions = {}): Promise<string> {
    return new TextDecoder().decode(await this.output("stdout", options));
  }

  async stderr(options: CallOptions = {}): Promise<string> {
    return new TextDecoder().decode(await this.output("stderr", options));
  }

  /** What it has written so far, as the bytes that it wrote. */
  output(stream: "stdout" | "stderr", options: CallOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    return this.#transport.bytes({ method: "GET", path: `${this.#path}/${stream}` }, options);
  }

  /** Its events from the first one on, or behind one, while it lasts and afterwards. */
  events(options: { after?: number; data?: boolean } & CallOptions = {}): AsyncGenerator<RunEvent, void, undefined> {
    const { after = 0, data, ...call } = options;
    const from = (number: number) => eventsOf(this.#session, this.id, { after: number, data });
    const plan = { begin: from(after), resume: (last: number) => from(last || after), last: "done" };
    return follow<RunEvent>(this.#transport, plan, call);
  }
}

function eventsOf(session: string, run: string, query: { after: number; data: boolean | undefined }) {
  return { method: "GET", path: `${session}/runs/${part(run)}/events`, query, endless: true } as const;
}

/** The runs of a session, newest first: `for await (const record of session.runs)`. */
export class Runs implements AsyncIterable<RunRecord> {
  readonly #transport: Transport;
  readonly #session: string;

  constructor(transport: Transport, session: string) {
    this.#transport = transport;
    this.#session = session;
  }

  [Symbol.asyncIterator](): AsyncGenerator<RunRecord, void, undefined> {
    return this.iterate();
  }

  /** All records; `limit` is how many come in one answer. */
  iterate(query: { limit?: number } = {}, options: CallOptions = {}): AsyncGenerator<RunRecord, void, undefined> {
    type Page = Answer<"/api/sessions/{session_id}/runs", "get">;
    const path = `${this.#session}/runs`;
    const get = (cursor?: string) =>
      this.#transport.json<Page>({ method: "GET", path, query: { ...query, cursor } }, options);
    return pages(get, (page) => page.runs);
  }

  list(options: CallOptions = {}): Promise<RunRecord[]> {
    return collect(this.iterate({}, options));
  }

  /** A run by its id. It isn't asked for yet. */
  get(id: string): Run {
    return new Run(this.#transport, this.#session, id);
  }
}
