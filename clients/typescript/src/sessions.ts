/** The sessions of a server. */

import { type CallOptions, once, type OnceOptions, type Sent, type Transport } from "./http.js";
import { split } from "./options.js";
import { collect, pages } from "./pages.js";
import { sessionPath } from "./paths.js";
import { Session } from "./session.js";
import type { DeletedSession, DeletedSessions, NewSession, SessionInfo, SessionList } from "./types.js";

/** The fields of a new session, besides its language. */
export interface SessionOptions extends Partial<Omit<NewSession, "language">>, OnceOptions {}

export interface SessionFilter {
  language?: string;
  status?: "idle" | "running" | "expired" | "deleted";
  /** Labels that it must have. */
  metadata?: Record<string, string>;
}

export class Sessions implements AsyncIterable<SessionInfo> {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Make a session, as `era.session` does. Throws Exists if the id is taken. */
  async create(language: string, options: SessionOptions = {}): Promise<Session> {
    const [body, call] = split(options);
    const headers = once(this.#transport, call);
    const request = { method: "POST", path: "/api/sessions", json: { language, ...body }, headers } as const;
    const info = await this.#transport.json<SessionInfo>(request, call);
    return new Session(this.#transport, info, options.session_id === undefined);
  }

  /** The session of this id. Throws NotFound. */
  async get(id: string, options: CallOptions = {}): Promise<Session> {
    const info = await this.#transport.json<SessionInfo>({ method: "GET", path: sessionPath(id) }, options);
    return new Session(this.#transport, info);
  }

  /** The sessions that pass a filter, newest first. */
  list(filter: SessionFilter = {}, options: CallOptions = {}): Promise<SessionInfo[]> {
    return collect(this.iterate(filter, options));
  }

  [Symbol.asyncIterator](): AsyncGenerator<SessionInfo, void, undefined> {
    return this.iterate();
  }

  /** The same, page by page. `limit` is how many come in one answer. */
  iterate(
    filter: SessionFilter & { limit?: number } = {},
    options: CallOptions = {},
  ): AsyncGenerator<SessionInfo, void, undefined> {
    const { limit = 100, ...rest } = filter;
    const query = filterQuery(rest);
    const get = (cursor?: string) =>
      this.#transport.json<SessionList>(
        { method: "GET", path: "/api/sessions", query: { ...query, limit, cursor } },
        options,
      );
    return pages(get, (page) => page.sessions);
  }

  /** Delete a session. For a day it can be restored, unless it is purged. */
  async delete(id: string, options: { purge?: boolean } & CallOptions = {}): Promise<DeletedSession> {
    const { purge, ...call } = options;
    return this.#transport.json({ method: "DELETE", path: sessionPath(id), query: { purge } }, call);
  }

  /** Delete the sessions that pass a filter, which must say something: `{ status: "idle" }`, `{ metadata: … }`. */
  deleteAll(filter: SessionFilter & { purge?: boolean }, options: CallOptions = {}): Promise<DeletedSessions> {
    const { purge, ...rest } = filter;
    const query = filterQuery(rest);
    if (Object.keys(query).length === 0) throw new TypeError("A filter is needed: an empty one would delete all.");
    return this.#transport.json({ method: "DELETE", path: "/api/sessions", query: { ...query, purge } }, options);
  }

  /** Bring back a session that expired or was deleted. */
  async restore(id: string, options: CallOptions = {}): Promise<Session> {
    const info = await this.#transport.json<SessionInfo>(
      { method: "POST", path: `${sessionPath(id)}/restore` },
      options,
    );
    return new Session(this.#transport, info);
  }

  /**
   * Make a session of an archive that `session.export()` gave. `id` gives it another id. Nobody may call its public URL, but
   * with `public` anybody if that was so in the exported session.
   */
  async import_(
    archive: Sent,
    { id, public: open, ...options }: { id?: string; public?: boolean } & CallOptions = {},
  ): Promise<Session> {
    const headers = { "Content-Type": "application/x-tar" };
    const call = {
      method: "POST",
      path: "/api/sessions/import",
      query: { id, public: open },
      body: archive,
      headers,
      endless: true,
    } as const;
    return new Session(this.#transport, await this.#transport.json<SessionInfo>(call, options));
  }
}

/** A filter as the query of a call; what is undefined is no part of it. */
function filterQuery({ language, status, metadata = {} }: SessionFilter): Record<string, string> {
  const query: Record<string, string> = {};
  if (language !== undefined) query["language"] = language;
  if (status !== undefined) query["status"] = status;
  for (const [label, value] of Object.entries(metadata)) query[`metadata.${label}`] = value;
  return query;
}
