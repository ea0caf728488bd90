/** The data of a session: the JSON object that its programs find in `.session_data.json`. */

import type { CallOptions, Transport } from "./http.js";
import type { Answer, Data, SessionInfo } from "./types.js";

export class SessionData {
  readonly #transport: Transport;
  readonly #session: string;

  constructor(transport: Transport, session: string) {
    this.#transport = transport;
    this.#session = session;
  }

  /** All of it. */
  async all(options: CallOptions = {}): Promise<Data> {
    const info = await this.#transport.json<SessionInfo>({ method: "GET", path: this.#session }, options);
    return info.data;
  }

  /** The value of one name, undefined if there is none. The caller names its type. */
  async get<T = unknown>(name: string, options: CallOptions = {}): Promise<T | undefined> {
    const data = await this.all(options);
    return Object.hasOwn(data, name) ? (data[name] as T) : undefined;
  }

  /**
   * Set the value of one name. The others are read first and sent with it, so what a run changes in between is lost:
   * change data by a run where several clients may.
   */
  async set(name: string, value: unknown, options: CallOptions = {}): Promise<void> {
    await this.replace({ ...(await this.all(options)), [name]: value }, options);
  }

  /** Delete one name, with the caution of `set`. */
  async delete(name: string, options: CallOptions = {}): Promise<void> {
    const { [name]: _, ...others } = await this.all(options);
    await this.replace(others, options);
  }

  /** Put `data` in place of all. It waits for the run under way, and makes a new version. */
  async replace(data: Data, options: CallOptions = {}): Promise<void> {
    type Changed = Answer<"/api/sessions/{session_id}", "patch">;
    const call = { method: "PATCH", path: this.#session, json: { data }, endless: true } as const;
    await this.#transport.json<Changed>(call, options);
  }
}
