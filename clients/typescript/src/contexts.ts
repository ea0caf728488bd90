/** Contexts: interpreters of a session that stay, so that variables of one cell are there for the next. */

import type { CallOptions, Transport } from "./http.js";
import { part } from "./paths.js";
import type { RunOptions, RunStream } from "./runs.js";
import type { Session } from "./session.js";
import type { Answer, ContextInfo, RunResult } from "./types.js";

/** What a cell takes besides its code. */
export type CellOptions = Omit<RunOptions, "context" | "command" | "args">;

/** One interpreter by its name. It begins with its first cell. */
export class Context {
  readonly #transport: Transport;
  readonly #session: Session;
  readonly #path: string;

  constructor(
    transport: Transport,
    session: Session,
    path: string,
    readonly name: string,
  ) {
    this.#transport = transport;
    this.#session = session;
    this.#path = `${path}/contexts/${part(name)}`;
  }

  /** Run a cell. `results` has what it showed, and `error` what it ended with. */
  run(code: string, options: CellOptions = {}): Promise<RunResult> {
    return this.#session.run(code, { ...options, context: this.name });
  }

  /** Run a cell and listen to it. */
  stream(code: string, options: CellOptions = {}): RunStream {
    return this.#session.stream(code, { ...options, context: this.name });
  }

  /** Interrupt the cell under way, as Ctrl-C does; whether there was one. */
  async interrupt(options: CallOptions = {}): Promise<boolean> {
    type Interrupted = Answer<"/api/sessions/{session_id}/contexts/{name}/interrupt", "post">;
    const path = `${this.#path}/interrupt`;
    return (await this.#transport.json<Interrupted>({ method: "POST", path }, options)).interrupted;
  }

  /** End the interpreter and start another one. */
  restart(options: CallOptions = {}): Promise<ContextInfo> {
    return this.#transport.json({ method: "POST", path: `${this.#path}/restart`, endless: true }, options);
  }

  /** End it, and a run in it. */
  async delete(options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: this.#path, endless: true }, options);
  }
}
