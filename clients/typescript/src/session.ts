/** One session of a server. */

import { Context } from "./contexts.js";
import { SessionData } from "./data.js";
import { NotFound } from "./errors.js";
import { Files } from "./files.js";
import { type CallOptions, once, type OnceOptions, type Transport } from "./http.js";
import { Inbox } from "./inbox.js";
import { split } from "./options.js";
import { sessionPath } from "./paths.js";
import { Process, Processes, type ProcessOptions } from "./processes.js";
import { Run, type RunOptions, Runs, RunStream, stoppingIfAborted } from "./runs.js";
import { SessionSetup } from "./setup.js";
import { Terminal, type TerminalOptions, type TerminalSize } from "./terminal.js";
import type {
  Answer,
  Checkpoint,
  CodeStored,
  ContextInfo,
  Copy,
  PublicUrl,
  RunResult,
  SessionChanges,
  SessionInfo,
  StoredCode,
  Ticket,
} from "./types.js";
import { Versions } from "./versions.js";

export class Session implements AsyncDisposable {
  readonly id: string;
  /** What the server last said about it; `refresh()` asks again. */
  info: SessionInfo;
  readonly data: SessionData;
  readonly files: Files;
  readonly runs: Runs;
  readonly processes: Processes;
  readonly versions: Versions;
  readonly setup: SessionSetup;
  readonly inbox: Inbox;
  readonly #transport: Transport;
  readonly #path: string;
  readonly #isTemporary: boolean;

  constructor(transport: Transport, info: SessionInfo, isTemporary = false) {
    this.id = info.id;
    this.info = info;
    this.#transport = transport;
    this.#path = sessionPath(info.id);
    this.#isTemporary = isTemporary;
    this.data = new SessionData(transport, this.#path);
    this.files = new Files(transport, this.#path);
    this.runs = new Runs(transport, this.#path);
    this.processes = new Processes(transport, this.#path);
    this.versions = new Versions(transport, this.#path);
    this.setup = new SessionSetup(transport, this.#path);
    this.inbox = new Inbox(transport, this.#path);
  }

  /**
   * Run code, or a `command`, and wait for its result. Without either, the stored code runs. A program that fails is no
   * error: look at `exit_code` and `status`.
   */
  run(code: string | undefined, options: RunOptions & { data: false }): Promise<Omit<RunResult, "data">>;
  run(code?: string, options?: RunOptions): Promise<RunResult>;
  run(code?: string, options: RunOptions = {}): Promise<RunResult> {
    const [{ data, ...body }, call] = split(options);
    return this.#run({ ...body, code }, data, call);
  }

  /** Run code and listen to it. If the connection breaks, the stream goes on where it was. */
  stream(code?: string, options: RunOptions = {}): RunStream {
    const [{ data, ...body }, call] = split(options);
    return new RunStream(this.#transport, this.#path, { ...body, code }, data, call);
  }

  /** Begin a run, and don't wait for it. */
  async background(code?: string, options: RunOptions = {}): Promise<Run> {
    type Begun = Answer<"/api/sessions/{session_id}/run", "post", 202>;
    const [{ data, ...body }, call] = split(options);
    const begun = await this.#run<Begun>({ ...body, code, background: true }, data, call);
    return this.runs.get(begun.run_id);
  }

  /** Send a run, and return its answer. An aborted run is stopped before the signal's reason is thrown. */
  #run<T>(json: object, data: boolean | undefined, call: OnceOptions): Promise<T> {
    const headers = once(this.#transport, call);
    const request = {
      method: "POST",
      path: `${this.#path}/run`,
      query: { data },
      json,
      headers,
      endless: true,
    } as const;
    const begin = () => this.#transport.json<T>(request, call);
    return stoppingIfAborted(call.signal, begin, () => this.runs.stopOfKey(headers["Idempotency-Key"]));
  }

  /** Start a process beside runs: a program and its arguments, or a line of shell. It stays until it ends. */
  process(command: string | string[], options: ProcessOptions = {}): Promise<Process> {
    return this.processes.start(command, options);
  }

  /** A login shell in a terminal, or with `process` the terminal of one that runs. */
  terminal(options: Partial<TerminalSize> & { process?: string } & TerminalOptions = {}): Promise<Terminal> {
    const { cols, rows, process, ...rest } = options;
    return Terminal.open(this.#transport, this.#path, `${this.#path}/terminal`, { cols, rows, process }, rest);
  }

  /** The interpreter of this name, which stays from its first cell on: `session.context().run("x = 1")`. */
  context(name = "main"): Context {
    return new Context(this.#transport, this, this.#path, name);
  }

  /** The interpreters that there are. */
  async contexts(options: CallOptions = {}): Promise<ContextInfo[]> {
    type Contexts = Answer<"/api/sessions/{session_id}/contexts", "get">;
    const path = `${this.#path}/contexts`;
    return (await this.#transport.json<Contexts>({ method: "GET", path }, options)).contexts;
  }

  /** Make what its files are at this moment its next version, behind the run under way. */
  checkpoint(options: CallOptions = {}): Promise<Checkpoint> {
    return this.#transport.json({ method: "POST", path: `${this.#path}/checkpoint`, endless: true }, options);
  }

  /** A ticket, with which a browser's page can open one WebSocket of the session, soon. */
  ticket(options: CallOptions = {}): Promise<Ticket> {
    return this.#transport.json({ method: "POST", path: `${this.#path}/tickets` }, options);
  }

  /** End all processes, and commit what they left. */
  async stop(options: CallOptions = {}): Promise<SessionInfo> {
    const call = { method: "POST", path: `${this.#path}/stop`, repeatable: true, endless: true } as const;
    this.info = await this.#transport.json<SessionInfo>(call, options);
    return this.info;
  }

  /** The stored code, which a run without code runs. */
  code(options: CallOptions = {}): Promise<StoredCode> {
    return this.#transport.json({ method: "GET", path: `${this.#path}/code` }, options);
  }

  setCode(code: string, description?: string, options: CallOptions = {}): Promise<CodeStored> {
    const json = { code, description };
    return this.#transport.json({ method: "PUT", path: `${this.#path}/code`, json, repeatable: true }, options);
  }

  /** Ask the server how the session is now. */
  async refresh(options: CallOptions = {}): Promise<SessionInfo> {
    this.info = await this.#transport.json<SessionInfo>({ method: "GET", path: this.#path }, options);
    return this.info;
  }

  /** Change settings; what isn't named stays. */
  async update(changes: SessionChanges, options: CallOptions = {}): Promise<SessionInfo> {
    type Changed = Answer<"/api/sessions/{session_id}", "patch">;
    const call = { method: "PATCH", path: this.#path, json: changes, endless: true } as const;
    this.info = (await this.#transport.json<Changed>(call, options)).metadata;
    return this.info;
  }

  /**
   * Go back: a new version with the content of an old one. While processes or contexts run this throws `SessionLive`;
   * with `stop`, they are ended first.
   */
  async rollback(version: number, options: CallOptions & { stop?: boolean } = {}): Promise<SessionInfo> {
    const { stop, ...given } = options;
    const json = stop ? { version, stop } : { version };
    const call = { method: "POST", path: `${this.#path}/rollback`, json, endless: true } as const;
    this.info = await this.#transport.json<SessionInfo>(call, given);
    return this.info;
  }

  /** Copy the session, or one of its versions. */
  async duplicate(copy: Partial<Copy> & OnceOptions = {}): Promise<Session> {
    const [json, call] = split(copy);
    const headers = once(this.#transport, call);
    const request = { method: "POST", path: `${this.#path}/duplicate`, json, headers } as const;
    return new Session(this.#transport, await this.#transport.json<SessionInfo>(request, call));
  }

  /**
   * The public address of a port: a site of its own, such as http://3000-LABEL.localhost:8787. Pages there can use absolute
   * paths and cookies. Where the name doesn't resolve, use `proxyUrl`.
   */
  async url(port = 80, options: CallOptions = {}): Promise<string> {
    return (await this.#host(port, options)).site_url;
  }

  /** The public address of a port as a path on the server's own address, which needs no name of its own. */
  async proxyUrl(port = 80, options: CallOptions = {}): Promise<string> {
    return (await this.#host(port, options)).url;
  }

  #host(port: number, options: CallOptions): Promise<PublicUrl> {
    return this.#transport.json({ method: "GET", path: `${this.#path}/host`, query: { port } }, options);
  }

  /** The whole session as one archive, whose body is read piece by piece. `era.sessions.import_` reads it. */
  export(
    { versions, ...options }: { versions?: "all" | "current" } & CallOptions = {},
  ): Promise<Response> {
    return this.#transport.open({ method: "GET", path: `${this.#path}/capsule`, query: { versions } }, options);
  }

  /** Delete the session. For a day `era.sessions.restore(id)` brings it back, unless it is purged. */
  async delete({ purge, ...options }: { purge?: boolean } & CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: this.#path, query: { purge } }, options);
  }

  /** Delete the session if it was made without an id; any other stays. `await using` calls this at the end of a block. */
  async close(): Promise<void> {
    if (!this.#isTemporary) return;
    try {
      await this.delete();
    } catch (error) {
      if (!(error instanceof NotFound)) throw error; // it is gone already
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
