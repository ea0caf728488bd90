/** What the browser tests share: a page of the dashboard, a line to the server, two ways to use the page. */

import { connect, createServer, type Server, type Socket } from 'node:net';
import { after } from 'node:test';
import { type Browser, type BrowserContextOptions, chromium, type Locator, type Page } from 'playwright-core';

export const SERVER = process.env.ERA_TEST_SERVER ?? 'http://127.0.0.1:8787';
/** One whose key is `open sesame`. */
export const KEYED_SERVER = process.env.ERA_TEST_KEYED_SERVER ?? '';
const CHROMIUM = process.env.ERA_TEST_CHROMIUM ?? '/usr/bin/chromium';
export const PATIENCE = 180_000;

let browser: Promise<Browser> | undefined;
after(async () => (await browser)?.close());

interface Opened extends AsyncDisposable {
  page: Page;
  /** Errors that the page has logged; a test asserts that there are none. */
  complaints: string[];
}

/** Give a test a page, and take a picture of it where the test fails. */
export async function withPage(
  act: (page: Page, complaints: string[]) => Promise<void>,
  options: BrowserContextOptions = {},
): Promise<void> {
  await using opened = await openPage(options);
  try {
    await act(opened.page, opened.complaints);
  } catch (error) {
    const path = `${process.env.ERA_TEST_DIRECTORY ?? '/tmp'}/failed-${Date.now()}.png`;
    await opened.page.screenshot({ path }).catch(() => undefined);
    (error as Error).message += `\nPicture: ${path}\nThe page logged: ${opened.complaints.join('\n')}`;
    throw error;
  }
}

async function openPage(options: BrowserContextOptions): Promise<Opened> {
  browser ??= chromium.launch({
    executablePath: CHROMIUM,
    args: ['--no-sandbox', '--disable-dev-shm-usage'],
    timeout: PATIENCE,
  });
  const context = await (await browser).newContext({
    viewport: { width: 1280, height: 800 },
    permissions: ['clipboard-read', 'clipboard-write'],
    ...options,
  });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  const complaints: string[] = [];
  page.on('console', (message) => {
    if (message.type() === 'error')
      complaints.push(`${message.text()} (${message.location().url}:${message.location().lineNumber})`);
  });
  page.on('pageerror', (error) => complaints.push(String(error)));
  return { page, complaints, [Symbol.asyncDispose]: () => context.close() };
}

/** Call the API, as the test's own client. */
export async function api<T = Record<string, unknown>>(
  path: string,
  body?: unknown,
  method = body === undefined ? 'GET' : 'POST',
  server = SERVER,
  key = '',
): Promise<T> {
  const raw = typeof body === 'string';
  const authorization: Record<string, string> = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(server + path, {
    method,
    headers: body === undefined || raw ? authorization : { 'Content-Type': 'application/json', ...authorization },
    body: body === undefined ? undefined : raw ? body : JSON.stringify(body),
  });
  if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${await response.text()}`);
  return (await response.json()) as T;
}

let serial = 0;

/** An id that no other test has. */
export function newId(name: string): string {
  return `${name}-${process.pid}-${++serial}`;
}

/** Wait until a condition holds. */
export async function eventually(condition: () => Promise<boolean> | boolean, what: string): Promise<void> {
  const end = Date.now() + PATIENCE;
  while (!(await condition())) {
    if (Date.now() > end) throw new Error(`never: ${what}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/** A line to the server, which can be cut: a page that is loaded through it finds the server away, and back again. */
export class Line {
  private readonly sockets = new Set<Socket>();
  private readonly listener: Server;
  url = '';

  private constructor() {
    const { hostname, port } = new URL(SERVER);
    this.listener = createServer((near) => {
      const far = connect(Number(port), hostname);
      for (const [socket, other] of [
        [near, far],
        [far, near],
      ] as const) {
        this.sockets.add(socket);
        socket.on('error', () => other.destroy());
        socket.on('close', () => this.sockets.delete(socket));
        socket.pipe(other);
      }
    });
  }

  static async laid(): Promise<Line> {
    const line = new Line();
    // Below the ports that the system hands out, or another program might get it while the line is cut.
    for (let tries = 0; ; tries++) {
      line.url = `http://127.0.0.1:${20_000 + Math.floor(Math.random() * 12_000)}`;
      try {
        await line.mend();
        return line;
      } catch (error) {
        if (tries > 20) throw error;
      }
    }
  }

  async cut(): Promise<void> {
    const closed = new Promise((done) => this.listener.close(done));
    for (const socket of this.sockets) socket.destroy();
    await closed;
  }

  mend(): Promise<void> {
    return new Promise((done, failed) => {
      this.listener.once('error', failed);
      this.listener.listen(Number(new URL(this.url).port), '127.0.0.1', () => {
        this.listener.off('error', failed);
        done();
      });
    });
  }
}

/** Somebody who uses the page, in one of two ways. */
export interface User {
  press(target: Locator): Promise<void>;
  type(target: Locator, text: string): Promise<void>;
}

/** Put a text in the place of what the focused element has, as somebody does who pastes it. */
async function replace(page: Page, text: string): Promise<void> {
  await page.keyboard.press('ControlOrMeta+a');
  await page.evaluate((copied) => navigator.clipboard.writeText(copied), text);
  await page.keyboard.press('ControlOrMeta+v');
}

export function mouseUser(page: Page): User {
  return {
    press: (target) => target.click(),
    async type(target, text) {
      await target.click();
      await replace(page, text);
    },
  };
}

/** Somebody without a mouse: Tab until it is reached, then Enter. */
export function keyboardUser(page: Page): User {
  const reach = async (target: Locator) => {
    await target.waitFor();
    const look = () =>
      target.evaluate((element) => ({
        focused: element.matches(':focus'),
        editing: document.activeElement?.shadowRoot != null,
      }));
    for (let presses = 0; presses < 150; presses++) {
      const { focused, editing } = await look();
      if (focused) return;
      // In an editor Tab indents, unless Escape came before.
      if (editing) await page.keyboard.press('Escape');
      await page.keyboard.press('Tab');
    }
    throw new Error(`can't be reached with Tab: ${target}`);
  };
  return {
    async press(target) {
      await reach(target);
      await page.keyboard.press('Enter');
    },
    async type(target, text) {
      await reach(target);
      await replace(page, text);
    },
  };
}
