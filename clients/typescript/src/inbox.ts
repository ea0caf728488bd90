/** The inbox of a session: webhooks that are stored, and run through the session's stored code in order. */

import type { CallOptions, Transport } from "./http.js";
import { pages } from "./pages.js";
import { part } from "./paths.js";
import type { Answer, Delivery, DeliveryContent, DeliveryList, InboxInfo, InboxSettings } from "./types.js";

export interface DeliveryFilter {
  status?: Delivery["status"];
  /** How many come in one answer. */
  limit?: number;
}

export class Inbox {
  readonly #transport: Transport;
  readonly #path: string;

  constructor(transport: Transport, session: string) {
    this.#transport = transport;
    this.#path = `${session}/inbox`;
  }

  /** Give the session an inbox, or change its settings. Fields that are left out get their defaults. */
  set(settings: Partial<InboxSettings> = {}, options: CallOptions = {}): Promise<InboxInfo> {
    return this.#transport.json({ method: "PUT", path: this.#path, json: settings, repeatable: true }, options);
  }

  get(options: CallOptions = {}): Promise<InboxInfo> {
    return this.#transport.json({ method: "GET", path: this.#path }, options);
  }

  /** Remove it with all its deliveries. */
  async delete(options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: this.#path }, options);
  }

  /** The deliveries, newest first. */
  deliveries(filter: DeliveryFilter = {}, options: CallOptions = {}): AsyncGenerator<Delivery, void, undefined> {
    const path = `${this.#path}/deliveries`;
    const get = (cursor?: string) =>
      this.#transport.json<DeliveryList>({ method: "GET", path, query: { ...filter, cursor } }, options);
    return pages(get, (page) => page.deliveries);
  }

  /** A delivery with the request that brought it. */
  async delivery(id: string, options: CallOptions = {}): Promise<DeliveryContent> {
    return this.#transport.json({ method: "GET", path: `${this.#path}/deliveries/${part(id)}` }, options);
  }

  /** Run a delivery once more. */
  async replay(id: string, options: CallOptions = {}): Promise<Delivery> {
    type Replayed = Answer<"/api/sessions/{session_id}/inbox/deliveries/{delivery_id}/replay", "post", 202>;
    const path = `${this.#path}/deliveries/${part(id)}/replay`;
    return this.#transport.json<Replayed>({ method: "POST", path }, options);
  }
}
