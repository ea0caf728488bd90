/** Runs: their options, their streams, their records, and those in the background. */

import { AnswerTimeout, ConnectionLost, ServerAway } from "./errors.js";
import { type Call, type CallOptions, once, type OnceOptions, RUN_HEADER, sleep, type Transport } from "./http.js";
import { collect, pages } from "./pages.js";
import { part } from "./paths.js";
import { follow, type Gap, isCut, PATIENCE_SECONDS } from "./streams.js";
import type { Answer, Data, ExecuteResult, RunBody, RunRecord, RunResult } from "./types.js";

/** What a run takes besides its code: `command`, `args`, `stdin`, `cwd`, `env`, `secrets`, `timeout`, `atomic`. */
export interface RunOptions extends Partial<Omit<RunBody, "code" | "background">>, OnceOptions {
  /** False leaves the session's data out of the answer. It may be large. */
  data?: boolean;
}

/** The end of a run: what its answer has besides the output, which came before. `data` may not be kept any more. */
export type Done = { type: "done"; data?: Data } & Omit<RunResult, "stdout" | "stderr" | "data">;
export type Output = { type: "stdout" | "stderr"; content: string };
/** Something that a cell shows, by MIME type. `result` is the value of its last expression. */
export type Shown =
  | { type: "display"; data: Data; metadata: Data; display_id?: string }
  | { type: "update_display"; data: Data; metadata: Data; display_id: string }
  | { type: "result"; data: Data; metadata: Data; execution_count: number | null };
/** What only a run in a context gives: what the cell shows, what it takes back, and the error that it ends with. */
export type CellEvent =
  | Shown
  | { type: "clear_output"; wait: boolean }
  | { type: "cell_error"; name: string; value: string; traceback: string };
/** What a stream gives: output as it is written, what a cell shows, and at the end how the run ended. */
export type RunEvent = Output | CellEvent | Gap | Done;
/** The end of a run without a session. */
export type ExecuteDone = { type: "done" } & Omit<ExecuteResult, "stdout" | "stderr">;
/** What the stream of a run without a session gives. */
export type ExecuteEvent = Output | Gap | ExecuteDone;

/** Seconds for which `stopOfKey` looks for a run that may be about to begin. */
const BEGIN_SECONDS = 2;
/** Seconds that each call to stop an aborted run may take. */
const LEAVING_SECONDS = 10;
const FIRST_LOOK = 0.05;
const LAST_LOOK = 2;

const isLast = <Event extends { type: string }, Last extends Event & { type: "done" }>(
  event: Event | undefined,
): event is Last => event?.type === "done";

/** A program's output as it comes, and how it ended: `for await (const event of stream)`. It can be read once. */
abstract class OutputStream<Event extends { type: string }, Last extends Event & { type: "done" }>
  implements AsyncIterable<Event> {
  readonly #events: AsyncGenerator<Event, void, undefined>;

  constructor(events: AsyncGenerator<Event, void, undefined>) {
    this.#events = events;
  }

  [Symbol.asyncIterator](): AsyncGenerator<Event, void, undefined> {
    return this.#events;
  }

  /** Read on to the end. */
  async done(): Promise<Last> {
    let last: Event | undefined;
    for await (const event of this.#events) last = event;
    if (!isLast<Event, Last>(last)) throw new TypeError("This stream has been read already.");
    return last;
  }
}

/**
 * A run without a session as it happens. Leaving the loop ends the program: nothing else could get at what it writes. So
 * it isn't taken up again where the connection breaks, which throws StreamCut.
 */
export class ExecuteStream extends OutputStream<ExecuteEvent, ExecuteDone> {
  constructor(transport: Transport, begin: Call, options: CallOptions) {
    super(follow(transport, { begin, resume: () => undefined, last: "done" }, options));
  }
}

/** A run of a session as it happens. Leaving the loop stops listening, not the run: `stop()` does that. */
export class RunStream extends OutputStream<RunEvent, Done> {
  readonly #transport: Transport;
  readonly #path: string;
  readonly #began: { runId?: string | undefined };

  constructor(transport: Transport, path: string, json: object, data: boolean | undefined, options: OnceOptions) {
    const headers = once(transport, options);
    const began: { runId?: string | undefined } = {};
    const plan = {
      begin: { method: "POST", path: `${path}/stream`, query: { data }, json, headers, endless: true },
      resume: (after: number) => (began.runId === undefined ? undefined : eventsOf(path, began.runId, { after, data })),
      last: "done",
    } as const;
    const events = follow<Output | Done>(transport, plan, options, (response) => {
      began.runId = response.headers.get(RUN_HEADER) ?? undefined;
    });
    const runs = new Runs(transport, path);
    super(stoppedIfAborted(options.signal, events, async () => {
      if (began.runId === undefined) await runs.stopOfKey(headers["Idempotency-Key"]);
      else await runs.get(began.runId).stop({ requestTimeout: LEAVING_SECONDS });
    }));
    this.#transport = transport;
    this.#path = path;
    this.#began = began;
  }

  /** Names the run, once it has begun. */
  get runId(): string | undefined {
    return this.#began.runId;
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

  /** Wait until it has ended. A server that goes away meanwhile is waited for, too, as by streams. */
  async wait(options: CallOptions = {}): Promise<RunRecord> {
    let answeredAt: number | undefined;
    for (let seconds = FIRST_LOOK;; seconds = Math.min(2 * seconds, LAST_LOOK)) {
      try {
        const record = await this.record(options);
        if (record.status !== "running") return record;
        answeredAt = Date.now();
      } catch (error) {
        if (answeredAt === undefined) throw error;
        const isLate = Date.now() - answeredAt > PATIENCE_SECONDS * 1000;
        if (isLate || this.#transport.retries === 0 || !(isCut(error) || error instanceof AnswerTimeout)) {
          throw wentAway(error);
        }
      }
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

/** Return what `begin` returns. If the caller aborts it, `stop` is called before the signal's reason is thrown. */
export async function stoppingIfAborted<T>(
  signal: AbortSignal | undefined,
  begin: () => Promise<T>,
  stop: () => Promise<void>,
): Promise<T> {
  signal?.throwIfAborted();
  try {
    return await begin();
  } catch (error) {
    if (signal?.aborted) await stop().catch(() => undefined);
    throw error;
  }
}

/** Give these events. If the caller aborts, `stop` is called before the signal's reason is thrown. */
async function* stoppedIfAborted<T>(
  signal: AbortSignal | undefined,
  events: AsyncGenerator<T, void, undefined>,
  stop: () => Promise<void>,
): AsyncGenerator<T, void, undefined> {
  signal?.throwIfAborted();
  try {
    yield* events;
  } catch (error) {
    if (signal?.aborted) await stop().catch(() => undefined);
    throw error;
  }
}

/** `ConnectionLost` for `ServerAway`, which says that nothing was done, although the server was sent something before. */
function wentAway(error: unknown): unknown {
  if (!(error instanceof ServerAway)) return error;
  return new ConnectionLost(error.message, { code: "connection_lost", hint: "The run's record says how it went on." });
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

  /** Stop the run that has begun with this idempotency key, or begins within two seconds. */
  async stopOfKey(key: string | undefined): Promise<void> {
    type Page = Answer<"/api/sessions/{session_id}/runs", "get">;
    const call = { method: "GET", path: `${this.#session}/runs`, query: { idempotency_key: key } } as const;
    const options = { requestTimeout: LEAVING_SECONDS };
    for (const until = Date.now() + BEGIN_SECONDS * 1000; key !== undefined && Date.now() < until;) {
      const [record] = (await this.#transport.json<Page>(call, options)).runs;
      if (record !== undefined) return void await this.get(record.run_id).stop(options);
      await sleep(FIRST_LOOK);
    }
  }

  /** A run by its id. It isn't asked for yet. */
  get(id: string): Run {
    return new Run(this.#transport, this.#session, id);
  }
}
