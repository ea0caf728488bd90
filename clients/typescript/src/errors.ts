/**
 * Every error that the client throws. Those that the server answers have a class for each code
 * (generated/errors.ts), below one for each status, so that a program catches as much or as little as it means to:
 *
 *     EraError
 *     ├── BadRequest (400) … Unavailable (503)   what the server answers, by status, and below those by code
 *     └── ClientError                            what happened on the way
 *         ├── ServerAway                         nothing accepts the connection, so nothing was sent
 *         ├── ConnectionLost                     it ended before the answer was complete
 *         ├── AnswerTimeout                      no answer came within `requestTimeout`
 *         ├── StreamCut                          a stream broke and could not be taken up again
 *         └── NotEra                             something else answers at this address
 *
 * A program that fails, times out or runs out of memory is no error: its run has an outcome. What a caller aborts throws
 * the signal's own reason, as `fetch` does. No error has anything of the key in it.
 *
 * Names that a URL can't carry the client refuses itself, by the error that the server would answer.
 */

export interface ErrorFields {
  status?: number;
  code?: string;
  hint?: string;
  requestId?: string;
  details?: unknown;
  retryAfter?: number;
  cause?: unknown;
}

export class EraError extends Error {
  /** The HTTP status; 0 where there was no answer. */
  readonly status: number;
  /** What went wrong, for programs: `no_such_run`. */
  readonly code: string;
  /** What to do about it. */
  readonly hint: string;
  /** Names the request in the server's log. */
  readonly requestId: string | undefined;
  readonly details: unknown;
  /** Seconds after which it may work, where the server says so. */
  readonly retryAfter: number | undefined;

  constructor(message: string, fields: ErrorFields = {}) {
    super(message, fields.cause === undefined ? undefined : { cause: fields.cause });
    this.name = new.target.name;
    this.status = fields.status ?? 0;
    this.code = fields.code ?? "internal";
    this.hint = fields.hint ?? "";
    this.requestId = fields.requestId;
    this.details = fields.details;
    this.retryAfter = fields.retryAfter;
  }
}

export class BadRequest extends EraError {}
export class Unauthorized extends EraError {}
export class Forbidden extends EraError {}
export class NotFound extends EraError {}
export class MethodNotAllowed extends EraError {}
export class TooSlow extends EraError {}
export class Conflict extends EraError {}
export class Expired extends EraError {}
export class PreconditionFailed extends EraError {}
export class TooLarge extends EraError {}
export class RangeNotSatisfiable extends EraError {}
export class TooBusy extends EraError {}
export class HeadersTooLarge extends EraError {}
export class NoAnswer extends EraError {}
export class RelayTimeout extends NoAnswer {}
export class Unavailable extends EraError {}

export class ClientError extends EraError {}
/** Browsers don't say so much: there it is a ConnectionLost. */
export class ServerAway extends ClientError {}
export class ConnectionLost extends ClientError {}
export class AnswerTimeout extends ClientError {}
export class NotEra extends ClientError {}

export class StreamCut extends ClientError {
  /** The run whose stream it was, if it had begun: its record says how it went on. */
  readonly runId: string | undefined;

  constructor(message: string, fields: ErrorFields & { runId?: string | undefined } = {}) {
    super(message, fields);
    this.runId = fields.runId;
  }
}
