/** A terminal in a session, by a WebSocket. */

import { ClientError, ConnectionLost } from "./errors.js";
import type { CallOptions, Transport } from "./http.js";
import { type Query, withQuery } from "./paths.js";
import { bytesOf, type ProcessOutput } from "./process_output.js";
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

type Told = { type: "attached"; process_id: string } | ProcessOutput | ({ type: "exit" } & TerminalExit);

/**
 * What is written to it comes out of `for await (const bytes of terminal)`, until its process ends: then `exit` says
 * how. Closing it leaves the process running.
 */
export class Terminal implements AsyncIterable<Uint8Array<ArrayBuffer>>, AsyncDisposable {
  /** Set once its process has ended. */
  exit: TerminalExit | undefined;
  /** Names its process, once the server has said so. */
  processId: string | undefined;
  readonly #socket: WebSocket;
  readonly #pieces: Uint8Array<ArrayBuffer>[] = [];
  #wake: () => void = () => undefined;
  #isOver = false;
  #failure: Error | undefined;

  constructor(socket: WebSocket) {
    this.#socket = socket;
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
    options: CallOptions,
  ): Promise<Terminal> {
    if (typeof WebSocket === "undefined") {
      const hint = "Node has one from version 22 on. Without it, a process with a pty has events and write().";
      throw new ClientError("This platform has no WebSocket.", { code: "no_websocket", hint });
    }
    const { ticket } = await transport.json<Ticket>({ method: "POST", path: `${session}/tickets` }, options);
    const url = transport.url.replace(/^http/, "ws") + withQuery(path, { ...query, ticket });
    const socket = new WebSocket(url);
    const terminal = new Terminal(socket);
    await new Promise<void>((resolve, reject) => {
      socket.addEventListener("open", () => resolve(), { once: true });
      socket.addEventListener("close", ({ code }) => reject(lost(code)), { once: true });
      options.signal?.addEventListener("abort", () => {
        socket.close();
        reject(options.signal?.reason);
      }, { once: true });
    });
    return terminal;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Uint8Array<ArrayBuffer>, void, undefined> {
    for (;;) {
      const piece = this.#pieces.shift();
      if (piece !== undefined) yield piece;
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
    if (data instanceof ArrayBuffer) {
      this.#pieces.push(new Uint8Array(data));
      this.#wake();
    } else if (typeof data === "string") {
      const event = JSON.parse(data) as Told;
      if (event.type === "attached") this.processId = event.process_id;
      else if (event.type === "stdout" || event.type === "stderr" || event.type === "pty") {
        this.#pieces.push(bytesOf(event));
        this.#wake();
      } else if (event.type === "exit") {
        this.exit = { exit_code: event.exit_code, signal: event.signal, reason: event.reason };
      }
    }
  }
}

function lost(code: number): ConnectionLost {
  const hint = "Its process runs on: session.processes.list() names it, and attach() goes back to it.";
  return new ConnectionLost(`The terminal's connection was closed (${code}).`, { code: "connection_lost", hint });
}
