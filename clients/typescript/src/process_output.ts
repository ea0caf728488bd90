/** What processes write, as events have it. */

import { fromBase64 } from "./base64.js";

export interface ProcessOutput {
  type: "stdout" | "stderr" | "pty";
  content: string;
  /** How `content` stands for bytes. `bytesOf(event)` gives them. */
  encoding: "utf-8" | "base64";
}

/** The bytes that a process wrote. */
export function bytesOf(event: ProcessOutput): Uint8Array<ArrayBuffer> {
  return event.encoding === "base64" ? fromBase64(event.content) : new TextEncoder().encode(event.content);
}
