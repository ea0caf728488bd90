/** The parser of server-sent events, on every way to cut a stream into pieces. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { EventParser, events, type ServerSentEvent } from "#built/sse.js";

function parse(pieces: Uint8Array[]): ServerSentEvent[] {
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(piece));
}

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);

const STREAM = lines(
  "\uFEFF: a comment",
  "event: stdout",
  'data: {"content": "süß 🎉"}',
  "id: 7",
  "retry: 10",
  "unknown: field",
  "",
  "data:first",
  "data: second",
  "data",
  "",
  "id: 8",
  "",
  "event: end",
  "data:  two spaces",
  "",
  "data: half of an event",
);

function lines(...text: string[]): string {
  return text.join("\n");
}

const EXPECTED = [
  { event: "stdout", data: '{"content": "süß 🎉"}', id: "7" },
  { event: "message", data: "first\nsecond\n", id: "7" },
  { event: "end", data: " two spaces", id: "8" },
];

for (const [name, end] of [["LF", "\n"], ["CR LF", "\r\n"], ["CR", "\r"]] as const) {
  test(`events are the same wherever the stream is cut, with ${name}`, () => {
    const all = bytes(STREAM.replaceAll("\n", end));
    assert.deepEqual(parse([all]), EXPECTED);
    for (let at = 1; at < all.length; at++) {
      assert.deepEqual(parse([all.subarray(0, at), all.subarray(at)]), EXPECTED, `cut at ${at}`);
    }
    assert.deepEqual(parse(Array.from(all, (byte) => Uint8Array.of(byte))), EXPECTED);
  });
}

test("an id with a NUL is ignored", () => {
  assert.deepEqual(parse([bytes("id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n")]).map(({ id }) => id), ["1", "1"]);
});

test("a long event in small pieces takes time in proportion", () => {
  const piece = bytes("x".repeat(1 << 10));
  const parser = new EventParser();
  parser.push(bytes("data: "));
  for (let n = 0; n < 20_000; n++) parser.push(piece);
  assert.equal(parser.push(bytes("\n\n"))[0]?.data.length, 20_000 << 10);
});

test("leaving the loop hangs up", async () => {
  let isCancelled = false;
  const body = new ReadableStream<Uint8Array>({
    pull: (controller) => controller.enqueue(bytes("data: again\n\n")),
    cancel: () => {
      isCancelled = true;
    },
  });
  for await (const event of events(body)) {
    assert.equal(event.data, "again");
    break;
  }
  assert.ok(isCancelled);
});
