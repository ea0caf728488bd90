/** API keys of owners. For the server's operator only. */

import type { CallOptions, Transport } from "./http.js";
import { part } from "./paths.js";
import type { Answer, KeyInfo, NewKey } from "./types.js";

export class Keys {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Create a key for an owner. Its `key` is shown this once only. */
  create(owner: string, description = "", options: CallOptions = {}): Promise<NewKey> {
    return this.#transport.json({ method: "POST", path: "/api/keys", json: { owner, description } }, options);
  }

  /** The keys, oldest first. */
  async list(options: CallOptions = {}): Promise<KeyInfo[]> {
    return (await this.#transport.json<Answer<"/api/keys", "get">>({ method: "GET", path: "/api/keys" }, options)).keys;
  }

  /** Revoke a key, at once. */
  async revoke(id: string, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: `/api/keys/${part(id)}` }, options);
  }
}
