/** Reads a stream while the server is killed and started again, which pytest does in between. */

import { createInterface } from "node:readline";
import process from "node:process";
import { client, lines, say } from "./support.ts";

const CODE = {
  output: "import sys; sys.stdout.write('x' * 6_000_000)",
  run: lines("import time", "while True: print(1, flush=True); time.sleep(0.02)"),
}[process.argv[2] === "run" ? "run" : "output"];

const session = await client().session("python");
const stream = session.stream(CODE, { timeout: 600 });
let size = 0;
let gaps = "no gap";
let isTold = false;
try {
  for await (const event of stream) {
    if (event.type === "stdout") size += event.content.length;
    if (event.type === "gap") gaps = "a gap";
    if (event.type === "done") say(`${size} bytes, ${gaps}, ${event.status}`);
    if (!isTold) {
      isTold = true;
      // Nothing is read meanwhile, so most of the output is still with the server when it is killed.
      if (process.argv[2] === "output") await session.runs.get(stream.runId ?? "").wait();
      say("begun");
      const input = createInterface({ input: process.stdin });
      for await (const _ of input) break;
      input.close();
    }
  }
} catch (error) {
  say(error instanceof Error ? error.name : String(error));
}
process.exit();
