/** Webhooks: where a server tells of what happens to its owner's sessions. */

import type { CallOptions, Transport } from "./http.js";
import { part } from "./paths.js";
import type { Answer, NewWebhook, WebhookDelivery, WebhookInfo, WebhookOptions } from "./types.js";

export class Webhooks {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Have events told to a URL, all or some. `secret` of the result, which notices are signed with, is shown this once. */
  create(url: string, options: WebhookOptions & CallOptions = {}): Promise<NewWebhook> {
    const { events, description, ...call } = options;
    return this.#transport.json({ method: "POST", path: "/api/webhooks", json: { url, events, description } }, call);
  }

  /** All, oldest first. */
  async list(options: CallOptions = {}): Promise<WebhookInfo[]> {
    const call = { method: "GET", path: "/api/webhooks" } as const;
    return (await this.#transport.json<Answer<"/api/webhooks", "get">>(call, options)).webhooks;
  }

  /** What waits to be told, and the last that were told or given up, newest first. */
  async deliveries(id: string, options: CallOptions = {}): Promise<WebhookDelivery[]> {
    const call = { method: "GET", path: `/api/webhooks/${part(id)}/deliveries` } as const;
    const answer = await this.#transport.json<Answer<"/api/webhooks/{webhook_id}/deliveries", "get">>(call, options);
    return answer.deliveries;
  }

  /** Have a notice told once more: one that was told or given up, or one that waits for its next try. */
  replay(id: string, deliveryId: string, options: CallOptions = {}): Promise<WebhookDelivery> {
    const path = `/api/webhooks/${part(id)}/deliveries/${part(deliveryId)}/replay`;
    return this.#transport.json({ method: "POST", path }, options);
  }

  /** Delete one, with what waits to be told to it. */
  async delete(id: string, options: CallOptions = {}): Promise<void> {
    await this.#transport.json({ method: "DELETE", path: `/api/webhooks/${part(id)}` }, options);
  }
}
