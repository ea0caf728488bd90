/** A session's versions: what it was after each change. */

import { FileTree } from "./files.js";
import type { CallOptions, Transport } from "./http.js";
import { collect, pages } from "./pages.js";
import { part } from "./paths.js";
import type { Version, VersionDiff, VersionHeader, VersionList } from "./types.js";

/** The versions, newest first: `for await (const version of session.versions)`. */
export class Versions implements AsyncIterable<VersionHeader> {
  readonly #transport: Transport;
  readonly #session: string;

  constructor(transport: Transport, session: string) {
    this.#transport = transport;
    this.#session = session;
  }

  [Symbol.asyncIterator](): AsyncGenerator<VersionHeader, void, undefined> {
    return this.iterate();
  }

  /** All versions; `limit` is how many come in one answer. */
  iterate(query: { limit?: number } = {}, options: CallOptions = {}): AsyncGenerator<VersionHeader, void, undefined> {
    const path = `${this.#session}/versions`;
    const get = (cursor?: string) =>
      this.#transport.json<VersionList>({ method: "GET", path, query: { ...query, cursor } }, options);
    return pages(get, (page) => page.versions);
  }

  list(options: CallOptions = {}): Promise<VersionHeader[]> {
    return collect(this.iterate({}, options));
  }

  /** A version with its data. */
  async get(number: number, options: CallOptions = {}): Promise<Version> {
    return this.#transport.json({ method: "GET", path: this.#path(number) }, options);
  }

  /** What a version changed. */
  async diff(number: number, options: CallOptions = {}): Promise<VersionDiff> {
    return this.#transport.json({ method: "GET", path: `${this.#path(number)}/diff` }, options);
  }

  /** The files of a version. */
  files(number: number): FileTree {
    return new FileTree(this.#transport, this.#path(number));
  }

  /** Give a version a name, by which it is kept. */
  async name(number: number, name: string, options: CallOptions = {}): Promise<VersionHeader> {
    const path = `${this.#path(number)}/name`;
    return this.#transport.json({ method: "PUT", path, json: { name }, repeatable: true }, options);
  }

  /** Take a version its name. */
  async unname(number: number, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: `${this.#path(number)}/name` }, options);
  }

  #path(number: number): string {
    return `${this.#session}/versions/${part(String(number))}`;
  }
}
