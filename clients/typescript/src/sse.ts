/** Server-sent events, as the HTML standard defines their format. */

/** One event: its `event` field (`message` if it has none), its data lines joined, and the last id seen so far. */
export interface ServerSentEvent {
  event: string;
  data: string;
  id: string;
}

/** Characters that one event may have. A server that sends more isn't one of ours. */
const MAX_EVENT = 256 * 1024 * 1024;

/**
 * Parses an event stream that comes in pieces. Pieces may end anywhere, also within a character or between CR and LF.
 * An event counts once the empty line behind it has come, so a stream that is cut never gives half of one.
 */
export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #endsInReturn = false;
  #size = 0;
  #event = "";
  #data: string[] = [];
  #id = "";

  /** The events that are complete with this piece. */
  push(piece: Uint8Array): ServerSentEvent[] {
    const text = this.#decoder.decode(piece, { stream: true });
    const hasEnd = this.#endsInReturn || text.includes("\n") || text.includes("\r");
    this.#rest += text;
    if (this.#rest.length > MAX_EVENT) throw new RangeError("An event of the stream is too long.");
    if (!hasEnd) return []; // a long line isn't looked through again with each of its pieces
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop() ?? "";
    this.#endsInReturn = this.#rest.endsWith("\r");
    const events: ServerSentEvent[] = [];
    for (const line of lines) {
      const event = this.#line(line);
      if (event) events.push(event);
    }
    return events;
  }

  #line(line: string): ServerSentEvent | undefined {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "event") this.#event = value;
    else if (field === "id" && !value.includes("\0")) this.#id = value;
    else if (field === "data") {
      this.#size += value.length;
      if (this.#size > MAX_EVENT) throw new RangeError("An event of the stream is too long.");
      this.#data.push(value);
    }
    return undefined; // a comment (an empty field), `retry`, or a field that the standard doesn't know
  }

  #dispatch(): ServerSentEvent | undefined {
    const event = { event: this.#event || "message", data: this.#data.join("\n"), id: this.#id };
    const isEmpty = this.#data.length === 0;
    this.#event = "";
    this.#data = [];
    this.#size = 0;
    return isEmpty ? undefined : event;
  }
}

/** The events of a response's body; `came` hears of each piece of it. Leaving the loop early hangs up. */
export async function* events(
  body: ReadableStream<Uint8Array>,
  came: () => void = () => undefined,
): AsyncGenerator<ServerSentEvent, void, undefined> {
  const parser = new EventParser();
  const reader = body.getReader();
  let isOver = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        isOver = true;
        return;
      }
      came();
      yield* parser.push(value);
    }
  } finally {
    if (!isOver) await reader.cancel().catch(() => undefined);
  }
}
