/** A server, as its clients see it. */

import { type CallOptions, type EraOptions, Transport } from "./http.js";
import { Keys, Owners } from "./keys.js";
import { split } from "./options.js";
import { pages } from "./pages.js";
import { ExecuteStream } from "./runs.js";
import type { Session } from "./session.js";
import { type SessionOptions, Sessions } from "./sessions.js";
import { Storage } from "./storage.js";
import type {
  Answer,
  AuditEntry,
  AuditList,
  ClusterHost,
  DayOfUsage,
  ExecuteBody,
  ExecuteResult,
  LanguageInfo,
  OwnQuotas,
  RunList,
  RunRecord,
  ServerFacts,
} from "./types.js";
import { Webhooks } from "./webhooks.js";

export interface RunFilter {
  status?: RunRecord["status"];
  /** A session's id. */
  session?: string;
  /** A time (RFC 3339): those that began then or later. */
  since?: string;
  /** How many come in one answer. */
  limit?: number;
}

export interface AuditFilter {
  action?: AuditEntry["action"];
  /** The id of what it was done to. */
  target?: string;
  /** For the operator; others see their own. */
  owner?: string;
  /** Times (RFC 3339). */
  since?: string;
  until?: string;
  limit?: number;
}

export type ExecuteOptions = Partial<Omit<ExecuteBody, "language" | "code">> & CallOptions;

export class Era {
  readonly sessions: Sessions;
  readonly storage: Storage;
  readonly keys: Keys;
  readonly owners: Owners;
  readonly webhooks: Webhooks;
  readonly #transport: Transport;

  constructor(options: EraOptions = {}) {
    this.#transport = new Transport(options);
    this.sessions = new Sessions(this.#transport);
    this.storage = new Storage(this.#transport);
    this.keys = new Keys(this.#transport);
    this.owners = new Owners(this.#transport);
    this.webhooks = new Webhooks(this.#transport);
  }

  /** The server's address. */
  get url(): string {
    return this.#transport.url;
  }

  /**
   * Make a session. It stays, as its data and files do, until it is deleted. The end of an `await using` block deletes it if
   * it was made without an id.
   */
  session(language: string, options: SessionOptions = {}): Promise<Session> {
    return this.sessions.create(language, options);
  }

  /** The quotas of this client's owner, and how much is used of each; `key` has those of its API key. */
  quotas(options: CallOptions = {}): Promise<OwnQuotas> {
    return this.#transport.json({ method: "GET", path: "/api/quotas" }, options);
  }

  /** What was used on each day, newest first; dates are such as 2026-01-31. `owner` is for the operator. */
  async usage(
    filter: { owner?: string; since?: string; until?: string } = {},
    options: CallOptions = {},
  ): Promise<DayOfUsage[]> {
    const call = { method: "GET", path: "/api/usage", query: filter } as const;
    return (await this.#transport.json<Answer<"/api/usage", "get">>(call, options)).usage;
  }

  /**
   * Who did what, newest first: with the keys of this client's owner, or for the operator with all. `limit` is how many
   * come in one answer.
   */
  audit(filter: AuditFilter = {}, options: CallOptions = {}): AsyncGenerator<AuditEntry, void, undefined> {
    const get = (cursor?: string) =>
      this.#transport.json<AuditList>(
        { method: "GET", path: "/api/audit", query: { limit: 100, ...filter, cursor } },
        options,
      );
    return pages(get, (page) => page.entries);
  }

  /**
   * Run code once, without a session. Without code, `options` have a `command`. Node waits 300 seconds for an answer:
   * `stream` is for what may take longer.
   */
  execute(language: string, code?: string, options: ExecuteOptions = {}): Promise<ExecuteResult> {
    const [body, call] = split(options);
    return this.#transport.json(execution({ language, code, ...body }), call);
  }

  /** `execute`, with its output as it comes. Leaving the loop ends the program. */
  stream(language: string, code?: string, options: ExecuteOptions = {}): ExecuteStream {
    const [body, call] = split(options);
    const headers = { Accept: "text/event-stream" };
    return new ExecuteStream(this.#transport, { ...execution({ language, code, ...body }), headers }, call);
  }

  /** The records of runs of all sessions that pass a filter, newest first. */
  runs(filter: RunFilter = {}, options: CallOptions = {}): AsyncGenerator<RunRecord, void, undefined> {
    const get = (cursor?: string) =>
      this.#transport.json<RunList>({ method: "GET", path: "/api/runs", query: { ...filter, cursor } }, options);
    return pages(get, (page) => page.runs);
  }

  /** The languages that the server knows. */
  async languages(options: CallOptions = {}): Promise<LanguageInfo[]> {
    type Languages = Answer<"/api/languages", "get">;
    return (await this.#transport.json<Languages>({ method: "GET", path: "/api/languages" }, options)).languages;
  }

  /** Whether the server works, and what isolation it gives. */
  health(options: CallOptions = {}): Promise<Record<string, unknown>> {
    return this.#transport.json({ method: "GET", path: "/health" }, options);
  }

  /** The limits in force on the server, and what its machine has and lacks; for the operator only. */
  server(options: CallOptions = {}): Promise<ServerFacts> {
    return this.#transport.json({ method: "GET", path: "/api/server" }, options);
  }

  /** The hosts of a cluster and how each is, also those that died within the last hour; for the operator only. */
  async hosts(options: CallOptions = {}): Promise<ClusterHost[]> {
    return (await this.#transport.json<Answer<"/api/hosts", "get">>({ method: "GET", path: "/api/hosts" }, options))
      .hosts;
  }
}

/** A run without a session, as a call. */
function execution(json: object) {
  return { method: "POST", path: "/api/execute", json, endless: true } as const;
}
