/** Waits for a run while pytest kills the server, and perhaps starts it again after some seconds. */

import process from "node:process";
import { client, say } from "./support.ts";

const session = await client({ requestTimeout: Number(process.argv[2]) }).session("python");
const running = session.run("import time; time.sleep(300)", { timeout: 300 }).catch((error: unknown) => error);
while ((await session.runs.list()).length === 0);
say("begun");
const error = await running;
say(error instanceof Error ? error.name : JSON.stringify(error));
process.exit();
