/** Errors out of the server's answers. */

import { EraError, type ErrorFields } from "./errors.js";
import { BY_CODE, BY_STATUS } from "./generated/errors.js";

/** The error that a body in the API's shape describes. A code that this client doesn't know has its status's class. */
export function errorOf(status: number, body: Record<string, unknown>, retryAfter?: number): EraError {
  const text = (name: string): string => (typeof body[name] === "string" ? body[name] : "");
  const code = text("code");
  const known = Object.hasOwn(BY_CODE, code) ? BY_CODE[code] : BY_STATUS[status];
  const fields: ErrorFields = { status, code: code || "unknown", hint: text("hint"), details: body["details"] };
  if (text("request_id")) fields.requestId = text("request_id");
  if (retryAfter !== undefined) fields.retryAfter = retryAfter;
  return new (known ?? EraError)(text("error") || `The server answers ${status}.`, fields);
}
