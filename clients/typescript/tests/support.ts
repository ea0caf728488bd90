/** What the tests share: the server that pytest started for them, and a proxy that hangs up. */

import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import process from "node:process";
import { Era, type EraOptions } from "era-sessions";

export const URL_ = process.env["ERA_TEST_URL"] ?? "http://127.0.0.1:8787";
export const KEY = process.env["ERA_TEST_KEY"];

/** A client of the test's server. */
export function client(options: EraOptions = {}): Era {
  return new Era({ url: URL_, ...(KEY === undefined ? {} : { apiKey: KEY }), ...options });
}

/** Write a line for pytest, at once. */
export function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

export async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const list: T[] = [];
  for await (const item of items) list.push(item);
  return list;
}

/** An address at which nothing listens. */
export async function closedAddress(): Promise<string> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return `http://127.0.0.1:${port}`;
}

/** Program text from its lines. */
export function lines(...text: string[]): string {
  return text.join("\n");
}

/**
 * A proxy before the test's server, which hangs up on the answers of some requests: of those whose first line matches,
 * the first after as many bytes as `cuts` has first, the second after as many as it has second, and so on.
 */
export class HangingUp implements AsyncDisposable {
  /** How many requests matched. */
  matched = 0;
  readonly #requests: RegExp;
  readonly #cuts: number[];
  readonly #sockets = new Set<Socket>();
  readonly #server = createServer((socket) => this.#serve(socket));

  constructor(requests: RegExp, cuts: number[]) {
    this.#requests = requests;
    this.#cuts = cuts;
  }

  async start(): Promise<string> {
    await new Promise<void>((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  #serve(caller: Socket): void {
    let left = Infinity;
    const target = new URL(URL_);
    const server = connect(Number(target.port), target.hostname);
    for (const socket of [caller, server]) {
      this.#sockets.add(socket);
      socket.on("error", () => undefined);
      socket.on("close", () => {
        caller.destroy();
        server.destroy();
      });
    }
    caller.on("data", (data) => {
      if (this.#requests.test(data.toString("latin1").split("\r\n", 1)[0] ?? "")) {
        left = this.#cuts[this.matched++] ?? Infinity;
      }
      server.write(data);
    });
    server.on("data", (data) => {
      const passed = data.subarray(0, left);
      left -= passed.length;
      if (passed.length > 0) caller.write(passed);
      if (left <= 0) caller.end(() => caller.destroy());
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}
