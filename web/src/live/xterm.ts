/** A terminal on a WebSocket: xterm.js shows it, and goes on behind what it has had when a connection breaks. */

import './sheet.ts';
import { FitAddon } from '@xterm/addon-fit';
import { type ITheme, Terminal } from '@xterm/xterm';
import { apiKey, at, call, withQuery } from '../api.ts';

const AGAIN_MS = 1000;
const BARRED = 1008; // the code with which the server closes when the key ends

export interface Followed {
  /** Whether there is a connection, and how the shell has ended. */
  state: 'connecting' | 'open' | 'lost' | 'ended';
  process: string;
  text: string;
}

function colors(): ITheme {
  const style = getComputedStyle(document.documentElement);
  const color = (name: string) => style.getPropertyValue(name).trim();
  const names = ['black', 'red', 'green', 'yellow', 'blue', 'magenta', 'cyan', 'white'];
  const ansi = names.flatMap((name) => [
    [name, color(`--ansi-${name}`)],
    [`bright${name[0]?.toUpperCase()}${name.slice(1)}`, color(`--ansi-${name}`)],
  ]);
  return {
    ...Object.fromEntries(ansi),
    background: color('--output'),
    foreground: color('--ink'),
    cursor: color('--accent'),
    cursorAccent: color('--output'),
    selectionBackground: color('--selection'),
  };
}

export class Shell {
  private readonly terminal: Terminal;
  private readonly fit = new FitAddon();
  private readonly session: string;
  private readonly tell: (followed: Followed) => void;
  private readonly observer: ResizeObserver;
  private socket: WebSocket | null = null;
  private followed: Followed;
  private after = 0;
  private closed = false;

  /** `process` is one with a terminal to go back to; '' starts a shell. */
  constructor(host: HTMLElement, session: string, process: string, tell: (followed: Followed) => void) {
    this.session = session;
    this.tell = tell;
    this.followed = { state: 'connecting', process, text: '' };
    this.terminal = new Terminal({
      fontFamily: getComputedStyle(document.documentElement).getPropertyValue('--mono'),
      fontSize: 13,
      cursorBlink: true,
      scrollback: 5000,
      screenReaderMode: true,
      theme: colors(),
      // What a program names a link is no reason to open it.
      linkHandler: { activate: () => undefined, allowNonHttpProtocols: false },
    });
    this.terminal.loadAddon(this.fit);
    this.terminal.open(host);
    this.fit.fit();
    this.terminal.onData((data) => this.send(new TextEncoder().encode(data)));
    this.terminal.onBinary((data) => this.send(Uint8Array.from(data, (char) => char.charCodeAt(0))));
    this.terminal.onResize(({ cols, rows }) => this.send(JSON.stringify({ resize: { cols, rows } })));
    this.observer = new ResizeObserver(() => this.fit.fit());
    this.observer.observe(host);
    void this.connect();
    this.terminal.focus();
  }

  recolor(): void {
    this.terminal.options.theme = colors();
  }

  focus(): void {
    this.terminal.focus();
  }

  dispose(): void {
    this.closed = true;
    this.observer.disconnect();
    this.socket?.close();
    this.terminal.dispose();
  }

  private put(changed: Partial<Followed>): void {
    this.followed = { ...this.followed, ...changed };
    if (!this.closed) this.tell(this.followed);
  }

  private send(data: string | Uint8Array<ArrayBuffer>): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  private async connect(): Promise<void> {
    try {
      // A WebSocket of a browser can't carry a key. A ticket is good once, and for this session only.
      const ticket = apiKey.value
        ? (await call<{ ticket: string }>(at(this.session, 'tickets'), { method: 'POST' })).ticket
        : undefined;
      if (this.closed) return;
      const path = withQuery(at(this.session, 'terminal'), {
        cols: this.terminal.cols,
        rows: this.terminal.rows,
        process: this.followed.process,
        after: this.followed.process && this.after ? this.after : undefined,
        ticket,
      });
      this.listen(new WebSocket(new URL(path, location.href.replace(/^http/, 'ws'))));
    } catch (error) {
      this.put({ state: 'lost', text: (error as Error).message });
      this.again();
    }
  }

  private listen(socket: WebSocket): void {
    this.socket = socket;
    socket.binaryType = 'arraybuffer';
    let opened = false;
    socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) {
        this.after += data.byteLength;
        this.terminal.write(new Uint8Array(data));
        return;
      }
      const event = JSON.parse(data) as { type: string; [name: string]: unknown };
      if (event.type === 'attached') {
        opened = true;
        this.after = Number(event.after);
        this.put({ state: 'open', process: String(event.process_id), text: '' });
        const { cols, rows } = this.terminal;
        this.send(JSON.stringify({ resize: { cols, rows } }));
      } else if (event.type === 'gap') this.after = Number(event.to);
      else if (event.type === 'exit')
        this.put({ state: 'ended', text: String(event.reason ?? `It ended with exit code ${event.exit_code}.`) });
    };
    socket.onclose = ({ code }) => {
      if (this.closed || this.followed.state === 'ended') return;
      if (!opened && !this.followed.process) {
        // No shell was made. Why, only an answer over HTTP could say.
        this.put({ state: 'ended', text: 'The server refused a terminal for this session.' });
        return;
      }
      if (code === BARRED) {
        this.put({ state: 'ended', text: 'Your API key is not good for this any more. The shell goes on.' });
        return;
      }
      this.put({ state: 'lost', text: 'The connection was lost. The shell goes on; this page looks for it.' });
      this.again();
    };
  }

  private again(): void {
    if (!this.closed) setTimeout(() => !this.closed && void this.connect(), AGAIN_MS);
  }
}
