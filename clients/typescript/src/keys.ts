/** API keys and owners. For the server's operator only. */

import type { CallOptions, Transport } from "./http.js";
import { part } from "./paths.js";
import type { Answer, KeyChange, KeyInfo, KeyOptions, NewKey, OwnerInfo, Quotas } from "./types.js";

export class Keys {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Create a key for an owner. Its `key` is shown this once only. */
  create(owner: string, description = "", options: KeyOptions & CallOptions = {}): Promise<NewKey> {
    const { scopes, expires_at, quotas, ...call } = options;
    const json = { owner, description, scopes, expires_at, quotas };
    return this.#transport.json({ method: "POST", path: "/api/keys", json }, call);
  }

  /** The keys, oldest first. */
  async list(options: CallOptions = {}): Promise<KeyInfo[]> {
    return (await this.#transport.json<Answer<"/api/keys", "get">>({ method: "GET", path: "/api/keys" }, options)).keys;
  }

  /** A key, without the key itself. */
  get(id: string, options: CallOptions = {}): Promise<KeyInfo> {
    return this.#transport.json({ method: "GET", path: `/api/keys/${part(id)}` }, options);
  }

  /** Change a key's description, scopes, end (`expires_at`, null: never) or quotas (null takes one back). */
  change(id: string, change: KeyChange, options: CallOptions = {}): Promise<KeyInfo> {
    return this.#transport.json({ method: "PATCH", path: `/api/keys/${part(id)}`, json: change }, options);
  }

  /** Give a key another secret, `key` of the result. The one before stays good for `graceSeconds`. */
  rotate(id: string, graceSeconds = 3600, options: CallOptions = {}): Promise<NewKey> {
    const json = { grace_seconds: graceSeconds };
    return this.#transport.json({ method: "POST", path: `/api/keys/${part(id)}/rotate`, json }, options);
  }

  /** Revoke a key, at once. */
  async revoke(id: string, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: `/api/keys/${part(id)}` }, options);
  }
}

export class Owners {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Owners who have a key, sessions or quotas of their own. */
  async list(options: CallOptions = {}): Promise<OwnerInfo[]> {
    const call = { method: "GET", path: "/api/owners" } as const;
    return (await this.#transport.json<Answer<"/api/owners", "get">>(call, options)).owners;
  }

  /** An owner's quotas, and how much is used of each. */
  get(owner: string, options: CallOptions = {}): Promise<OwnerInfo> {
    return this.#transport.json({ method: "GET", path: `/api/owners/${part(owner)}` }, options);
  }

  /** Set quotas of an owner's; null takes one back, and the server's default holds again. */
  setQuotas(owner: string, quotas: Quotas, options: CallOptions = {}): Promise<OwnerInfo> {
    return this.#transport.json({ method: "PATCH", path: `/api/owners/${part(owner)}`, json: { quotas } }, options);
  }
}
