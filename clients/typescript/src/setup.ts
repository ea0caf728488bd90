/** The setup of a session: installing its packages, running its commands. */

import type { CallOptions, Transport } from "./http.js";
import { follow, type Gap } from "./streams.js";
import type { Packages, SessionInfo, SetupResult } from "./types.js";

/** `status` when it begins to wait or to run, `line` for what is written, `done` at the end. */
export type SetupEvent =
  | { type: "status"; setup_status: string }
  | { type: "line"; stream: "stdout" | "stderr"; text: string }
  | { type: "done"; setup_status: string; setup_result: SetupResult };

export class SessionSetup {
  readonly #transport: Transport;
  readonly #session: string;

  constructor(transport: Transport, session: string) {
    this.#transport = transport;
    this.#session = session;
  }

  /** Follow the setup until it has ended. */
  events(options: CallOptions = {}): AsyncGenerator<SetupEvent | Gap, void, undefined> {
    const path = `${this.#session}/setup/events`;
    const from = (after: number) =>
      ({ method: "GET", path, query: after > 0 ? { after } : {}, endless: true }) as const;
    return follow<SetupEvent>(this.#transport, { begin: from(0), resume: from, last: "done" }, options);
  }

  /** Wait until it has ended. One that failed has `success` false and says why in `error`. */
  async wait(options: CallOptions & { onEvent?: (event: SetupEvent | Gap) => void } = {}): Promise<SetupResult> {
    const { onEvent, ...call } = options;
    for await (const event of this.events(call)) {
      onEvent?.(event);
      if (event.type === "done") return event.setup_result;
    }
    throw new TypeError("unreachable: a stream ends with its last event, or with an error");
  }

  /** Install everything again, after a failure or for newer versions. */
  again(options: CallOptions = {}): Promise<SessionInfo> {
    return this.#transport.json({ method: "POST", path: `${this.#session}/setup`, endless: true }, options);
  }

  /** What is installed, with exact versions. */
  packages(options: CallOptions = {}): Promise<Packages> {
    return this.#transport.json({ method: "GET", path: `${this.#session}/environment` }, options);
  }
}
