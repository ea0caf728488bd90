/**
 * Calls to a server: addresses, the key, time limits, and when a call is made again.
 *
 * A call is made again in two cases. It was not begun, because no connection came about, or because the server refused it
 * for now (429 or 503 with Retry-After). Or the answer was lost, and the call may have been carried out: then only if a second time does no
 * harm, because it only reads, because it sets something to the same value once more, or because it has an
 * Idempotency-Key, by which the server knows that it is the same call. So it is where a host of a cluster was lost as it
 * answered.
 *
 * The number of attempts is bounded. Those that only wait for a restarting server don't count: they end with the call's
 * timeout.
 */

import { errorOf } from "./answered_errors.js";
import { AnswerTimeout, ClientError, ConnectionLost, EraError, NotEra, ServerAway } from "./errors.js";
import { HomeLost, NotReady, OutcomeUnknown, RunUnderWay } from "./generated/errors.js";
import { type Query, withQuery } from "./paths.js";

export interface EraOptions {
  /** The server's address; left out: the environment's ERA_URL or ERA_SERVER, else http://127.0.0.1:8787. */
  url?: string | undefined;
  /** A key of the server's; left out: the environment's ERA_API_KEY. */
  apiKey?: string | undefined;
  /** Seconds that a call may take; runs, streams and what waits for a run take as long as they need; 60. */
  requestTimeout?: number | undefined;
  /** How often a call is made again where that is safe, not counting attempts that wait for a restarting server; 3. */
  retries?: number | undefined;
  /** In place of the platform's own. */
  fetch?: typeof fetch | undefined;
}

/** What any call takes besides its own fields. */
export interface CallOptions {
  /** Gives up the call. A run of a session is stopped, and a run without one ends. */
  signal?: AbortSignal | undefined;
  /** Seconds that this call may take. */
  requestTimeout?: number | undefined;
}

/** What a call takes that the server carries out only once for each key. */
export interface OnceOptions extends CallOptions {
  /** The key by which the server knows this call again; left out: one is made for each call. */
  idempotencyKey?: string | undefined;
}

/** What a request may send. A stream can be sent once only, so such a call isn't made again. */
export type Sent = string | Uint8Array | ArrayBuffer | Blob | ReadableStream<Uint8Array>;

export interface Call {
  method: "GET" | "HEAD" | "PUT" | "POST" | "PATCH" | "DELETE";
  path: string;
  query?: Query;
  json?: unknown;
  body?: Sent;
  headers?: Record<string, string>;
  /** It may be made again although it may have been carried out. */
  repeatable?: boolean;
  /** It takes as long as a program does: there is no time limit but the caller's own. */
  endless?: boolean;
}

const DEFAULT_URL = "http://127.0.0.1:8787";
const DEFAULT_SECONDS = 60;
const DEFAULT_RETRIES = 3;
/** A server that wants to be left alone for longer than this isn't waited for. */
const MAX_RETRY_AFTER = 60;
const BACKOFF_SECONDS = 0.25;
/** The statuses of a server, or a proxy before it, that can't answer for now. */
export const AWAY_STATUSES = [502, 503, 504];
const HEADERS_TIMEOUT = "UND_ERR_HEADERS_TIMEOUT";

/** The field of an answer's headers that names its run. */
export const RUN_HEADER = "x-era-run";

export class Transport {
  readonly url: string;
  readonly retries: number;
  readonly #key: string | undefined;
  readonly #seconds: number;
  readonly #fetch: typeof fetch;
  /** Whether the server has answered before. If it can't be reached then, it may be restarting. */
  #isKnown = false;

  constructor(options: EraOptions = {}) {
    this.url = baseUrl(options.url ?? environment("ERA_URL") ?? environment("ERA_SERVER") ?? DEFAULT_URL);
    this.#key = checkedKey(options.apiKey ?? environment("ERA_API_KEY"));
    this.#seconds = options.requestTimeout ?? DEFAULT_SECONDS;
    this.retries = options.retries ?? DEFAULT_RETRIES;
    this.#fetch = options.fetch ?? ((input, init) => globalThis.fetch(input, init));
  }

  /** The JSON that a call answers. The caller names its type. */
  async json<T>(call: Call, options: CallOptions = {}): Promise<T> {
    return this.#repeated(call, options, async (response) => {
      const text = await response.text();
      const value = parsed(text);
      if (value === undefined) throw this.#foreign(response.status);
      return value as T;
    });
  }

  /** The bytes that a call answers. */
  async bytes(call: Call, options: CallOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    return this.#repeated(call, options, async (response) => new Uint8Array(await response.arrayBuffer()));
  }

  /** The answer of a call, whose body is still to be read. The time limit ends with its head. */
  async open(call: Call, options: CallOptions = {}): Promise<Response> {
    return this.#repeated(call, options, (response) => Promise.resolve(response), true);
  }

  async #repeated<T>(
    call: Call,
    options: CallOptions,
    read: (response: Response) => Promise<T>,
    keepsBody = false,
  ): Promise<T> {
    const isWhole = !(call.body instanceof ReadableStream);
    const again: Again = { lost: isWhole && canRepeat(call), refused: isWhole, mayBeDone: undefined };
    const until = Date.now() + (this.#limit(call, options) ?? Infinity) * 1000;
    let awaySince: number | undefined;
    for (let attempt = 0, count = 0;; attempt++) {
      options.signal?.throwIfAborted();
      try {
        return await this.#attempt(call, options, read, keepsBody);
      } catch (error) {
        if (again.lost && this.retries > 0 && isHeadersTimeout(error)) continue; // the platform's patience has ended, ours hasn't
        const isAway = this.#isAway(error, again);
        awaySince = isAway ? awaySince ?? Date.now() : undefined;
        const isWaiting = isAway || isOwnRun(error, again);
        const canGoOn = isWaiting ? this.retries > 0 : count < this.retries;
        const wait = canGoOn ? delay(error, again, attempt) : undefined;
        const last = Math.min(until, (awaySince ?? Infinity) + this.#seconds * 1000);
        if (wait === undefined || Date.now() + wait * 1000 > last) { // too late is no help
          throw saysUndone(error) ? again.mayBeDone ?? error : error;
        }
        if (!isWaiting) count += 1;
        if (mayBeDone(error)) again.mayBeDone ??= error;
        await sleep(wait, options.signal);
      }
    }
  }

  /** Whether a server that was there can't be reached now, so that it may be restarting. */
  #isAway(error: unknown, again: Again): boolean {
    const hasBeenThere = this.#isKnown || (again.mayBeDone !== undefined && !isProxys(again.mayBeDone));
    return hasBeenThere && (error instanceof ServerAway || isProxys(error) || error instanceof NotReady);
  }

  async #attempt<T>(
    call: Call,
    options: CallOptions,
    read: (response: Response) => Promise<T>,
    keepsBody: boolean,
  ): Promise<T> {
    const seconds = this.#limit(call, options);
    const clock = new Clock(seconds, options.signal);
    let opened = false;
    try {
      const response = await this.#fetch(this.url + withQuery(call.path, call.query), this.#init(call, clock.signal));
      if (!response.ok) throw await this.#refusal(call, response);
      this.#isKnown = true;
      const value = await read(keepsBody ? watched(response, () => clock.stop(false)) : response);
      opened = keepsBody;
      return value;
    } catch (error) {
      if (options.signal?.aborted) throw options.signal.reason;
      if (clock.isOver) throw this.#timedOut(call, seconds ?? 0);
      if (error instanceof EraError) throw error;
      throw this.#lost(call, error);
    } finally {
      clock.stop(opened);
    }
  }

  /** Seconds that a call may take, if there is a limit. */
  #limit(call: Call, options: CallOptions): number | undefined {
    return options.requestTimeout ?? (call.endless ? undefined : this.#seconds);
  }

  #init(call: Call, signal: AbortSignal): RequestInit {
    const headers: Record<string, string> = { Accept: "*/*", ...call.headers };
    if (this.#key !== undefined) headers["Authorization"] = `Bearer ${this.#key}`;
    if (call.json !== undefined) headers["Content-Type"] = "application/json";
    const init: RequestInit & { duplex?: "half" } = { method: call.method, headers, signal, redirect: "error" };
    const body = call.json === undefined ? call.body : JSON.stringify(call.json);
    if (body !== undefined) init.body = body as BodyInit;
    if (body instanceof ReadableStream) init.duplex = "half";
    return init;
  }

  /** The error that an answer which isn't a success stands for. */
  async #refusal(call: Call, response: Response): Promise<EraError> {
    if (call.method === "HEAD") return errorOf(response.status, {}); // such an answer has no body
    const body = parsed(await response.text().catch(() => ""));
    const isOurs = typeof body === "object" && body !== null && "error" in body && "code" in body;
    if (!isOurs) return this.#foreign(response.status);
    const seconds = Number(response.headers.get("retry-after") ?? "");
    return errorOf(response.status, body as Record<string, unknown>, seconds > 0 ? seconds : undefined);
  }

  #foreign(status: number): EraError {
    return new NotEra(`${this.url} answers ${status}, and not as an ERA server.`, {
      status,
      code: "not_era",
      hint: "Check the address. A proxy on the way may have answered in the server's place.",
    });
  }

  #timedOut(call: Call, seconds: number): EraError {
    return new AnswerTimeout(`${call.method} ${call.path} has not been answered within ${seconds} s.`, {
      code: "answer_late",
      hint: "It may have been carried out. Give it a longer requestTimeout.",
    });
  }

  #lost(call: Call, error: unknown): EraError {
    if (isUnreached(error)) {
      return new ServerAway(`No server answers at ${this.url} (${reasonOf(error)}).`, {
        code: "server_away",
        hint: "Start one with `era serve`, or say where it is: new Era({ url }), or ERA_SERVER.",
        cause: error,
      });
    }
    return new ConnectionLost(
      `${call.method} ${call.path}: the connection to ${this.url} broke (${reasonOf(error)}).`,
      {
        code: "connection_lost",
        hint: codeOf(error) === HEADERS_TIMEOUT
          ? "It may have been carried out. Node waits 300 seconds for an answer: follow what takes longer by stream()."
          : "It may have been carried out: look before you ask again. session.runs.list() has the runs that began; a call " +
            "with the same idempotencyKey isn't carried out twice.",
        cause: error,
      },
    );
  }
}

/** One attempt's time limit and the caller's signal, as one signal. */
class Clock {
  isOver = false;
  readonly #controller = new AbortController();
  readonly #caller: AbortSignal | undefined;
  readonly #timer: ReturnType<typeof setTimeout> | undefined;
  readonly #abort = (): void => this.#controller.abort(this.#caller?.reason);

  constructor(seconds: number | undefined, caller: AbortSignal | undefined) {
    this.#caller = caller;
    if (caller?.aborted) this.#abort();
    caller?.addEventListener("abort", this.#abort, { once: true });
    if (seconds !== undefined) {
      const end = (): void => {
        this.isOver = true;
        this.#controller.abort();
      };
      this.#timer = setTimeout(end, Math.min(seconds * 1000, 2 ** 31 - 1));
    }
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** `opened`: the body is still being read, which the caller's signal must be able to end. */
  stop(opened: boolean): void {
    clearTimeout(this.#timer);
    if (!opened) this.#caller?.removeEventListener("abort", this.#abort);
  }
}

/** An answer that says when its body has ended, was cut or isn't wanted any more. */
function watched(response: Response, ended: () => void): Response {
  if (response.body === null) {
    ended();
    return response;
  }
  const reader = response.body.getReader();
  const body = new ReadableStream({
    type: "bytes",
    async pull(controller) {
      try {
        for (let read = await reader.read(); !read.done; read = await reader.read()) {
          if (read.value.byteLength > 0) return controller.enqueue(read.value);
        }
      } catch (error) {
        ended();
        throw error;
      }
      ended();
      controller.close();
      controller.byobRequest?.respond(0);
    },
    cancel(reason) {
      ended();
      return reader.cancel(reason);
    },
  });
  return new Response(body, response);
}

/** A key for one call, in the headers that carry it; none where nothing is to be made again. */
export function once(transport: Transport, options: OnceOptions): Record<string, string> {
  const isNeeded = transport.retries > 0 || options.signal !== undefined; // an aborted run is found by its key
  const key = options.idempotencyKey ?? (isNeeded ? randomKey() : undefined);
  return key === undefined ? {} : { "Idempotency-Key": key };
}

/** Wait for so many seconds. Throws the signal's reason once it is aborted. */
export function sleep(seconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const stop = (): void => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

/** Seconds before the attempt after number `attempt`, from 0: each twice the one before, and never two callers at once. */
export function backoff(attempt: number): number {
  return BACKOFF_SECONDS * 2 ** Math.min(attempt, 5) * (0.5 + Math.random() / 2);
}

/** What is known of a call's attempts. */
interface Again {
  /** It may be made again although it may have been carried out. */
  lost: boolean;
  /** It may be made again where nothing of it was done. */
  refused: boolean;
  /** The error of an earlier attempt that may have been carried out, if there was one. */
  mayBeDone: unknown;
}

/** Seconds until the next attempt, or undefined where there is to be none. */
function delay(error: unknown, again: Again, attempt: number): number | undefined {
  if (!(error instanceof EraError)) return undefined;
  if (mayBeDone(error) || isOwnRun(error, again)) { // whatever the headers say
    return again.lost ? backoff(Math.min(attempt, 3)) : undefined;
  }
  if (error.retryAfter !== undefined) {
    return again.refused && error.retryAfter <= MAX_RETRY_AFTER ? error.retryAfter : undefined;
  }
  return error instanceof ServerAway && again.refused ? backoff(Math.min(attempt, 3)) : undefined;
}

/** Whether the call may have been carried out, judging by this error alone. */
function mayBeDone(error: unknown): boolean {
  return isProxys(error) || [ConnectionLost, HomeLost, OutcomeUnknown].some((kind) => error instanceof kind);
}

/** Whether an error, by itself, says that nothing of the call was done. */
function saysUndone(error: unknown): boolean {
  return error instanceof ServerAway || error instanceof RunUnderWay ||
    (error instanceof EraError && (error.status === 429 || error.retryAfter !== undefined));
}

/** Whether the run under way is that of an earlier attempt, whose answer was lost. */
function isOwnRun(error: unknown, again: Again): boolean {
  return again.mayBeDone !== undefined && error instanceof RunUnderWay;
}

/** Whether a proxy answered that it has no answer of the server. */
function isProxys(error: unknown): boolean {
  return error instanceof NotEra && AWAY_STATUSES.includes(error.status);
}

function canRepeat(call: Call): boolean {
  const isOnce = call.headers !== undefined && "Idempotency-Key" in call.headers;
  return call.method === "GET" || call.method === "HEAD" || isOnce || call.repeatable === true;
}

/** Node gives up an answer whose head takes 300 seconds, which a run may. The same key gets the same run's answer. */
function isHeadersTimeout(error: unknown): boolean {
  return error instanceof ClientError && codeOf(error.cause) === HEADERS_TIMEOUT;
}

/** Whether no connection came about, as far as the platform says: Node by a code, Deno in words, Bun by another code. */
function isUnreached(error: unknown): boolean {
  const codes = ["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "EHOSTUNREACH", "ENETUNREACH", "UND_ERR_CONNECT_TIMEOUT"];
  if (["read", "write"].includes(fieldOf(error, "syscall") ?? "")) return false; // a connection broke that had been made
  return [...codes, "ConnectionRefused"].includes(codeOf(error) ?? "") ||
    /client error \(Connect\)/.test(deepest(error));
}

function codeOf(error: unknown): string | undefined {
  return fieldOf(error, "code");
}

/** A text that an error has, or the first of its causes that has one. */
function fieldOf(error: unknown, name: string): string | undefined {
  const own = typeof error === "object" && error !== null ? error as Record<string, unknown> : {};
  const value = own[name];
  return typeof value === "string" ? value : "cause" in own ? fieldOf(own["cause"], name) : undefined;
}

function reasonOf(error: unknown): string {
  return codeOf(error) ?? deepest(error);
}

/** What the first cause of an error says. */
function deepest(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.cause === undefined ? error.message : deepest(error.cause);
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function randomKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `ts-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

/** A variable of the environment, where the platform has one and lets it be read. */
function environment(name: string): string | undefined {
  try {
    const { process } = globalThis as { process?: { env?: Record<string, string | undefined> } };
    return process?.env?.[name] || undefined;
  } catch {
    return undefined;
  }
}

/** The address without a slash at its end. One with a password would show it in every error. */
function baseUrl(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (url === undefined || !["http:", "https:"].includes(url.protocol)) {
    throw new TypeError("The server's url must be an address such as http://127.0.0.1:8787.");
  }
  if (url.username || url.password) throw new TypeError("The server's url has a password in it. Use apiKey.");
  if (url.search || url.hash) throw new TypeError("The server's url has a query or a fragment.");
  return url.href.replace(/\/+$/, "");
}

/** The key, which must be what a header can carry. The platform's own complaint would quote it. */
function checkedKey(key: string | undefined): string | undefined {
  if (key !== undefined && !/^[\x21-\x7e]+$/.test(key)) {
    throw new TypeError("The apiKey has characters that no key has, or is empty. Look for spaces and line ends.");
  }
  return key;
}
