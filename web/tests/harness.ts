/** What the browser tests share: a page of the dashboard, a server of one's own, two ways to use the page. */

import { type ChildProcess, spawn } from 'node:child_process';
import { createServer } from 'node:net';
import { after } from 'node:test';
import { type Browser, type BrowserContextOptions, chromium, type Locator, type Page } from 'playwright-core';

export const SERVER = process.env.ERA_TEST_SERVER ?? 'http://127.0.0.1:8787';
/** One whose key is `open sesame`. */
export const KEYED_SERVER = process.env.ERA_TEST_KEYED_SERVER ?? '';
const CHROMIUM = process.env.ERA_TEST_CHROMIUM ?? '/usr/bin/chromium';
export const PATIENCE = 60_000;

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
  browser ??= chromium.launch({ executablePath: CHROMIUM, args: ['--no-sandbox', '--disable-dev-shm-usage'] });
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

function isFree(port: number): Promise<boolean> {
  return new Promise((done) => {
    const probe = createServer();
    probe.once('error', () => done(false));
    probe.listen(port, '127.0.0.1', () => probe.close(() => done(true)));
  });
}

/** A server of the test's own, which may be killed and started again on the same port. */
export class OwnServer {
  readonly port: number;
  readonly directory: string;
  private process: ChildProcess | undefined;

  private constructor(port: number, directory: string) {
    this.port = port;
    this.directory = directory;
  }

  static async start(directory: string): Promise<OwnServer> {
    let port: number;
    // Below those that the system hands out, or another program might have got it before the server has.
    do port = 20_000 + Math.floor(Math.random() * 12_000);
    while (!(await isFree(port)));
    const server = new OwnServer(port, directory);
    await server.begin();
    return server;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  async begin(): Promise<void> {
    const era = process.env.ERA_TEST_COMMAND ?? 'era';
    this.process = spawn(era, ['serve', '--port', String(this.port), '--data-dir', this.directory], {
      stdio: 'ignore',
    });
    await eventually(
      () =>
        fetch(`${this.url}/health`).then(
          (answer) => answer.ok,
          () => false,
        ),
      'the server starts',
    );
  }

  async stop(): Promise<void> {
    const { process: running } = this;
    if (!running || running.exitCode !== null) return;
    const ended = new Promise((done) => running.once('exit', done));
    running.kill('SIGTERM');
    await ended;
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
    const focused = () => target.evaluate((element) => element.matches(':focus'));
    for (let presses = 0; presses < 150; presses++) {
      if (await focused()) return;
      // In an editor Tab indents, unless Escape came before.
      if (await page.evaluate(() => document.activeElement?.shadowRoot != null)) await page.keyboard.press('Escape');
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
