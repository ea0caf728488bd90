/**
 * Event streams that are taken up again where they broke.
 *
 * Every event of a run has a number. When the connection ends before the last event, the client asks for the events
 * behind the last one that it has, so that nothing is missed and nothing comes twice. What the server keeps no longer
 * comes as an event `gap`.
 */

import { ConnectionLost, EraError, ServerAway, StreamCut } from "./errors.js";
import { errorOf } from "./answered_errors.js";
import { AWAY_STATUSES, backoff, type Call, type CallOptions, RUN_HEADER, sleep, type Transport } from "./http.js";
import { events, type ServerSentEvent } from "./sse.js";

/** How long a server that went away is waited for, counted from when it last sent anything, heartbeats too. */
export const PATIENCE_SECONDS = 60;

/** Events that the server keeps no longer: those with the numbers `from` to `to`. */
export interface Gap {
  type: "gap";
  from: number;
  to: number;
}

/** How one kind of stream is read. */
export interface StreamPlan {
  /** The call that begins it. */
  begin: Call;
  /** The call that goes on behind the event with this number, or undefined where that can't be done. */
  resume: (after: number, response: Response | undefined) => Call | undefined;
  /** The type of the event after which nothing comes. */
  last: string;
}

/** The events of a stream, up to and with its last one. `opened` hears of the first answer. */
export async function* follow<Event extends { type: string }>(
  transport: Transport,
  plan: StreamPlan,
  options: CallOptions,
  opened: (response: Response) => void = () => undefined,
): AsyncGenerator<Event | Gap, void, undefined> {
  let after = 0;
  let began: Response | undefined;
  let call: Call | undefined = plan.begin;
  let brokenSince: number | undefined;
  const came = (): void => brokenSince = undefined;
  const nothing = (): void => undefined;
  for (let attempt = 0;; attempt++) {
    let why: unknown;
    try {
      const response = await transport.open(call, options);
      if (began === undefined) opened(response);
      began ??= response;
      // Not where a proxy answers with a page of its own.
      const isServers = response.headers.get("content-type")?.startsWith("text/event-stream") ?? false;
      for await (const sent of bodyEvents(response, isServers ? came : nothing)) {
        const event = JSON.parse(sent.data) as Event | Gap;
        if (event.type === "error") throw failure(event);
        after = Number(sent.id) || after;
        brokenSince = undefined;
        attempt = 0;
        yield event;
        if (event.type === plan.last) return;
      }
    } catch (error) {
      if (options.signal?.aborted) throw options.signal.reason;
      if (!isCut(error) || began === undefined) throw error;
      why = error;
    }
    brokenSince ??= Date.now();
    call = transport.retries > 0 ? plan.resume(after, began) : undefined;
    const isTooLate = Date.now() - brokenSince > PATIENCE_SECONDS * 1000;
    if (call === undefined || isTooLate) throw cut(began, why);
    await sleep(backoff(attempt), options.signal);
  }
}

/** A stream that ended before its last event: it can't be taken up again. */
function cut(began: Response | undefined, cause: unknown): StreamCut {
  const runId = began?.headers.get(RUN_HEADER) ?? undefined;
  return new StreamCut("The stream ended before its last event, and could not be taken up again.", {
    code: "stream_cut",
    hint: runId === undefined ? "What it has written is lost." : "The run's record says how it went on.",
    runId,
    cause,
  });
}

async function* bodyEvents(
  response: Response,
  came: () => void,
): AsyncGenerator<ServerSentEvent, void, undefined> {
  if (response.body === null) return;
  try {
    yield* events(response.body, came);
  } catch (error) {
    if (error instanceof RangeError) throw error; // too long an event, as it would be again
    throw new BrokenBody(error);
  }
}

/** Reading the body failed, as it does when a connection is cut. */
class BrokenBody extends Error {
  constructor(cause: unknown) {
    super("The connection was cut.", { cause });
  }
}

/** Whether the server, or the way to it, is gone for now. */
export function isCut(error: unknown): boolean {
  return [BrokenBody, ConnectionLost, ServerAway].some((kind) => error instanceof kind) ||
    (error instanceof EraError && AWAY_STATUSES.includes(error.status)); // what an `error` event tells has no status
}

/** The error that an `error` event tells of. */
function failure(event: object): EraError {
  return errorOf(0, event as Record<string, unknown>);
}
