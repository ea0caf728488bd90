/** A terminal in a session, by a WebSocket. */

import { errorOf } from "./answered_errors.js";
import { ClientError, ConnectionLost, EraError } from "./errors.js";
import type { CallOptions, Transport } from "./http.js";
import { type Query, withQuery } from "./paths.js";
import { bytesOf, type ProcessOutput } from "./process_output.js";
import type { Gap } from "./streams.js";
import type { Ticket } from "./types.js";

export interface TerminalSize {
  cols: number;
  rows: number;
}

/** How the process behind a terminal ended. */
export interface TerminalExit {
  exit_code: number | null;
  signal: string | null;
  reason: string | null;
}

export interface TerminalOptions extends CallOptions {
  /** Begin behind this byte of the output. */
  after?: number;
  /** Hears of output that the server keeps no longer, in its place between the bytes that are read. */
  onGap?: (gap: Gap) => void;
}

type Told =
  | { type: "attached"; process_id: string }
  | { type: "error" }
  | Gap
  | ProcessOutput
  | ({ type: "exit" } & TerminalExit);

/**
 * What is written to it comes out of `for await (const bytes of terminal)`, until its process ends: then `exit` says
 * how. What the server refuses, as input that nobody reads, is thrown there; another `for await` goes on behind it.
 * Closing it leaves the process running.
 */
export class Terminal implements AsyncIterable<Uint8Array<ArrayBuffer>>, AsyncDisposable {
  /** Set once its process has ended. */
  exit: TerminalExit | undefined;
  /** Names its process, once the server has said so. */
  processId: string | undefined;
  readonly #socket: WebSocket;
  readonly #onGap: TerminalOptions["onGap"];
  readonly #pieces: (Uint8Array<ArrayBuffer> | Gap | EraError)[] = [];
  #wake: () => void = () => undefined;
  #isOver = false;
  #failure: Error | undefined;

  constructor(socket: WebSocket, onGap?: TerminalOptions["onGap"]) {
    this.#socket = socket;
    this.#onGap = onGap;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("message", ({ data }) => this.#receive(data));
    socket.addEventListener("close", ({ code }) => {
      const isCut = this.exit === undefined && code !== 1000;
      if (isCut) this.#failure = lost(code);
      this.#isOver = true;
      this.#wake();
    });
  }

  /** Open the terminal at a path. A WebSocket can't carry the key, so a ticket for one connection takes its place. */
  static async open(
    transport: Transport,
    session: string,
    path: string,
    query: Query,
    options: TerminalOptions,
  ): Promise<Terminal> {
    if (typeof WebSocket === "undefined") {
      const hint = "Node has one from version 22 on. Without it, a process with a pty has events and write().";
      throw new ClientError("This platform has no WebSocket.", { code: "no_websocket", hint });
    }
    const { ticket } = await transport.json<Ticket>({ method: "POST", path: `${session}/tickets` }, options);
    const url = transport.url.replace(/^http/, "ws") + withQuery(path, { ...query, after: options.after, ticket });
    const socket = new WebSocket(url);
    const terminal = new Terminal(socket, options.onGap);
    await new Promise<void>((resolve, reject) => {
      socket.addEventListener("open", () => resolve(), { once: true });
      const abort = (): void => {
        socket.close();
        reject(options.signal?.reason);
      };
      options.signal?.addEventListener("abort", abort, { once: true });
      socket.addEventListener("close", ({ code }) => {
        options.signal?.removeEventListener("abort", abort);
        reject(lost(code));
      }, { once: true });
    });
    return terminal;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array<ArrayBuffer>, void, undefined> {
    for (;;) {
      const piece = this.#pieces.shift();
      if (piece instanceof EraError) throw piece;
      else if (piece instanceof Uint8Array) yield piece;
      else if (piece !== undefined) this.#onGap?.(piece);
      else if (this.#failure !== undefined) throw this.#failure;
      else if (this.#isOver) return;
      else await new Promise<void>((resolve) => this.#wake = resolve);
    }
  }

  /** Type something. */
  write(data: string | Uint8Array): void {
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data;
    this.#socket.send(bytes as Uint8Array<ArrayBuffer>);
  }

  resize(size: TerminalSize): void {
    this.#socket.send(JSON.stringify({ resize: size }));
  }

  signal(signal: string): void {
    this.#socket.send(JSON.stringify({ signal }));
  }

  /** End the input. */
  closeInput(): void {
    this.#socket.send(JSON.stringify({ eof: true }));
  }

  close(): Promise<void> {
    this.#socket.close(1000);
    return Promise.resolve();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #receive(data: unknown): void {
    if (data instanceof ArrayBuffer) this.#pieces.push(new Uint8Array(data));
    else if (typeof data === "string") {
      const event = JSON.parse(data) as Told;
      if (event.type === "attached") this.processId = event.process_id;
      else if (event.type === "gap") this.#pieces.push(event);
      else if (event.type === "error") this.#pieces.push(errorOf(0, { ...event }));
      else if (event.type === "stdout" || event.type === "stderr" || event.type === "pty") {
        this.#pieces.push(bytesOf(event));
      } else if (event.type === "exit") {
        this.exit = { exit_code: event.exit_code, signal: event.signal, reason: event.reason };
      }
    }
    this.#wake();
  }
}

function lost(code: number): ConnectionLost {
  const hint = "Its process runs on: session.processes.list() names it, and attach() goes back to it.";
  return new ConnectionLost(`The terminal's connection was closed (${code}).`, { code: "connection_lost", hint });
}
