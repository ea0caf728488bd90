/** The storage that an owner's sessions and clients share: text by key, SQL databases, bytes by key. */

import { fromBase64, toBase64 } from "./base64.js";
import { NotFound } from "./errors.js";
import type { CallOptions, Transport } from "./http.js";
import { keyPath, namespacePath } from "./paths.js";
import type {
  Answer,
  Data,
  ObjectList,
  ResourceList,
  ResourceStats,
  SqlParams,
  SqlResult,
  StoredValue,
  ValueList,
} from "./types.js";

export interface ListFilter {
  prefix?: string;
  /** How many come in one answer. */
  limit?: number;
}

export interface ResourceFilter {
  type?: "kv" | "d1" | "r2";
  namespace?: string;
  key_prefix?: string;
  limit?: number;
  offset?: number;
}

export class Storage {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Text by key. */
  kv(namespace: string): KeyValues {
    return new KeyValues(this.#transport, namespace);
  }

  /** A SQL database, of SQLite's dialect. */
  d1(namespace: string): Database {
    return new Database(this.#transport, namespace);
  }

  /** Bytes by key. */
  r2(namespace: string): Objects {
    return new Objects(this.#transport, namespace);
  }

  /** What is stored. */
  resources(filter: ResourceFilter = {}, options: CallOptions = {}): Promise<ResourceList> {
    return this.#transport.json({ method: "GET", path: "/api/resources/list", query: { ...filter } }, options);
  }

  /** How much is stored. */
  stats(options: CallOptions = {}): Promise<ResourceStats> {
    return this.#transport.json({ method: "GET", path: "/api/resources/stats" }, options);
  }
}

export class KeyValues {
  readonly #transport: Transport;
  readonly #path: string;

  constructor(transport: Transport, namespace: string) {
    this.#transport = transport;
    this.#path = namespacePath("kv", namespace);
  }

  /** The value of a key, undefined if it has none. */
  async get(key: string, options: CallOptions = {}): Promise<string | undefined> {
    return (await this.entry(key, options))?.value;
  }

  /** A value with its metadata. */
  async entry(key: string, options: CallOptions = {}): Promise<StoredValue | undefined> {
    return orUndefined(this.#transport.json<StoredValue>({ method: "GET", path: this.#key(key) }, options));
  }

  async set(key: string, value: string, metadata?: Data, options: CallOptions = {}): Promise<void> {
    const json = metadata === undefined ? { value } : { value, metadata };
    await this.#transport.json({ method: "PUT", path: this.#key(key), json, repeatable: true }, options);
  }

  /** Delete a value. It is a success even if there is none. */
  async delete(key: string, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: this.#key(key), repeatable: true }, options);
  }

  /** The keys with their metadata, in order. */
  async *list(filter: ListFilter = {}, options: CallOptions = {}): AsyncGenerator<ValueList["keys"][number]> {
    for (let cursor: string | null = null;;) {
      const call = { method: "GET", path: this.#path, query: { ...filter, cursor } } as const;
      const page: ValueList = await this.#transport.json<ValueList>(call, options);
      yield* page.keys;
      cursor = page.cursor;
      if (page.list_complete || cursor === null) return;
    }
  }

  /** Delete every key; how many there were. */
  async clear(options: CallOptions = {}): Promise<number> {
    return cleared(this.#transport, this.#path, options);
  }

  #key(key: string): string {
    return keyPath(this.#path, key);
  }
}

export class Objects {
  readonly #transport: Transport;
  readonly #path: string;

  constructor(transport: Transport, namespace: string) {
    this.#transport = transport;
    this.#path = namespacePath("r2", namespace);
  }

  /** The bytes of an object, undefined if there is none. */
  async get(key: string, options: CallOptions = {}): Promise<Uint8Array<ArrayBuffer> | undefined> {
    return (await this.object(key, options))?.content;
  }

  /** An object with its metadata. */
  async object(key: string, options: CallOptions = {}): Promise<StoredObject | undefined> {
    type Got = Answer<"/api/storage/r2/{namespace}/{key}", "get">;
    const got = await orUndefined(this.#transport.json<Got>({ method: "GET", path: this.#key(key) }, options));
    return got && { ...got, content: fromBase64(got.content) };
  }

  async put(key: string, content: Uint8Array | string, metadata?: Data, options: CallOptions = {}): Promise<void> {
    const bytes = typeof content === "string" ? new TextEncoder().encode(content) : content;
    const encoded = toBase64(bytes);
    const json = metadata === undefined ? { content: encoded } : { content: encoded, metadata };
    await this.#transport.json({ method: "PUT", path: this.#key(key), json, repeatable: true }, options);
  }

  /** Delete an object. It is a success even if there is none. */
  async delete(key: string, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: this.#key(key), repeatable: true }, options);
  }

  /** The keys with sizes and times, in order. */
  async *list(filter: ListFilter = {}, options: CallOptions = {}): AsyncGenerator<ObjectList["objects"][number]> {
    for (let cursor: string | null = null;;) {
      const call = { method: "GET", path: this.#path, query: { ...filter, cursor } } as const;
      const page: ObjectList = await this.#transport.json<ObjectList>(call, options);
      yield* page.objects;
      cursor = page.cursor;
      if (!page.truncated || cursor === null) return;
    }
  }

  /** Delete every object; how many there were. */
  async clear(options: CallOptions = {}): Promise<number> {
    return cleared(this.#transport, this.#path, options);
  }

  #key(key: string): string {
    return keyPath(this.#path, key);
  }
}

export interface StoredObject {
  content: Uint8Array<ArrayBuffer>;
  size: number;
  uploaded: string;
  customMetadata: Data;
}

export class Database {
  readonly #transport: Transport;
  readonly #path: string;

  constructor(transport: Transport, namespace: string) {
    this.#transport = transport;
    this.#path = namespacePath("d1", namespace);
  }

  /** Run one statement; `params` are for its `?`, or by name for `:name`. */
  query(sql: string, params?: SqlParams, options: CallOptions = {}): Promise<SqlResult> {
    return this.#sql("query", sql, params, options);
  }

  /** Run statements in one transaction. */
  exec(sql: string, params?: SqlParams, options: CallOptions = {}): Promise<SqlResult> {
    return this.#sql("exec", sql, params, options);
  }

  /** Delete the database. */
  async drop(options: CallOptions = {}): Promise<void> {
    await cleared(this.#transport, this.#path, options);
  }

  #sql(call: "query" | "exec", sql: string, params: SqlParams, options: CallOptions): Promise<SqlResult> {
    const json = params === undefined ? { sql } : { sql, params };
    return this.#transport.json({ method: "POST", path: `${this.#path}/${call}`, json }, options);
  }
}

async function cleared(transport: Transport, path: string, options: CallOptions): Promise<number> {
  type Cleared = Answer<"/api/storage/kv/{namespace}", "delete">;
  return (await transport.json<Cleared>({ method: "DELETE", path, repeatable: true }, options)).deleted;
}

/** Undefined in place of a 404. */
async function orUndefined<T>(answer: Promise<T>): Promise<T | undefined> {
  try {
    return await answer;
  } catch (error) {
    if (error instanceof NotFound) return undefined;
    throw error;
  }
}
