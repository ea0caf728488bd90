/** Processes beside the runs of a session: with input, signals and terminals, until they end or the session is stopped. */

import { type CallOptions, once, type OnceOptions, type Transport } from "./http.js";
import { split } from "./options.js";
import { part } from "./paths.js";
import type { ProcessOutput } from "./process_output.js";
import { follow, type Gap } from "./streams.js";
import { Terminal, type TerminalOptions, type TerminalSize } from "./terminal.js";
import type { Answer, ProcessBody, ProcessInfo } from "./types.js";

/** What a process takes besides its command: `cwd`, `env`, `secrets`, `stdin`, `pty`, `tag`, `timeout`. */
export interface ProcessOptions extends Partial<Omit<ProcessBody, "command">>, OnceOptions {}

export interface ProcessExit {
  type: "exit";
  exit_code: number | null;
  signal: string | null;
  reason: string | null;
}

export type ProcessEvent = ProcessOutput | ProcessExit | Gap;

export class Process {
  readonly #transport: Transport;
  readonly #session: string;
  readonly #path: string;

  /** `id` is that of the process, or its tag. */
  constructor(
    transport: Transport,
    session: string,
    readonly id: string,
  ) {
    this.#transport = transport;
    this.#session = session;
    this.#path = `${session}/processes/${part(id)}`;
  }

  /** What the server knows of it. */
  info(options: CallOptions = {}): Promise<ProcessInfo> {
    return this.#transport.json({ method: "GET", path: this.#path }, options);
  }

  /** Its output from the beginning, or behind a byte of it, and at last its exit. It goes on where a connection breaks. */
  events({ after = 0, ...options }: { after?: number } & CallOptions = {}): AsyncGenerator<
    ProcessEvent,
    void,
    undefined
  > {
    const from = (byte: number) =>
      ({ method: "GET", path: `${this.#path}/events`, query: { after: byte }, endless: true }) as const;
    const plan = { begin: from(after), resume: (last: number) => from(last || after), last: "exit" };
    return follow<ProcessOutput | ProcessExit>(this.#transport, plan, options);
  }

  /** Wait until it has ended. */
  async wait(options: CallOptions = {}): Promise<ProcessInfo> {
    for await (const event of this.events(options)) if (event.type === "exit") break;
    return this.info(options);
  }

  /** Write to its standard input or terminal. */
  async write(data: string | Uint8Array, options: CallOptions = {}): Promise<void> {
    const headers = { "Content-Type": "application/octet-stream" };
    await this.#transport.json({ method: "POST", path: `${this.#path}/stdin`, body: data, headers }, options);
  }

  /** End its standard input. */
  async closeInput(options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: `${this.#path}/stdin` }, options);
  }

  /** Send a signal to it and the processes of its group: `INT`, `TERM`. */
  async signal(signal: string, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "POST", path: `${this.#path}/signal`, json: { signal } }, options);
  }

  /** Give its terminal another size. */
  async resize(pty: TerminalSize, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "PATCH", path: this.#path, json: { pty }, repeatable: true }, options);
  }

  /** End it; it is dead when this returns. */
  end(options: CallOptions = {}): Promise<ProcessInfo> {
    return this.#transport.json({ method: "DELETE", path: this.#path, repeatable: true }, options);
  }

  /** Its terminal, by a WebSocket. */
  attach(options: TerminalOptions = {}): Promise<Terminal> {
    return Terminal.open(this.#transport, this.#session, `${this.#path}/attach`, {}, options);
  }
}

export class Processes {
  readonly #transport: Transport;
  readonly #session: string;

  constructor(transport: Transport, session: string) {
    this.#transport = transport;
    this.#session = session;
  }

  /** Start a process: a program and its arguments, or a line of shell. */
  async start(command: string | string[], options: ProcessOptions = {}): Promise<Process> {
    const [body, call] = split(options);
    const json = { command, ...body };
    const headers = once(this.#transport, call);
    // It waits for a setup, and for a run that it can't join.
    const request = { method: "POST", path: `${this.#session}/processes`, json, headers, endless: true } as const;
    return this.get((await this.#transport.json<ProcessInfo>(request, call)).process_id);
  }

  /** Those that run and those that ended last, newest first. */
  async list(options: CallOptions = {}): Promise<ProcessInfo[]> {
    type Listed = Answer<"/api/sessions/{session_id}/processes", "get">;
    const call = { method: "GET", path: `${this.#session}/processes` } as const;
    return (await this.#transport.json<Listed>(call, options)).processes;
  }

  /** A process by its id or tag. It isn't asked for yet. */
  get(id: string): Process {
    return new Process(this.#transport, this.#session, id);
  }
}
