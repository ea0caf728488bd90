/** What a program writes, as it comes: inert, with its colours, and bounded, so that no output can stop the page. */

import { useEffect, useRef } from 'preact/hooks';
import { Ansi } from '../ansi.ts';

const SHOWN = 400_000;
const LINE = 20_000;
const KEPT = 200_000;

type Stream = 'stdout' | 'stderr';

/** Text in a <pre>. It is kept out of Preact: thousands of small pieces would each cost a comparison. */
export class Screen {
  private readonly ansi: { [stream in Stream]: Ansi } = { stdout: new Ansi(), stderr: new Ansi() };
  private readonly element: HTMLElement;
  private readonly notice: HTMLElement;
  private line: HTMLElement;
  private lineLength = 0;
  private length = 0;
  private hidden = 0;
  private pending: [Stream, string][] = [];
  private frame = 0;

  constructor(element: HTMLElement) {
    this.element = element;
    element.replaceChildren();
    this.notice = document.createElement('p');
    this.notice.className = 'output-notice';
    this.notice.hidden = true;
    this.line = this.newLine();
    element.append(this.notice, this.line);
  }

  /** Write a piece; it is seen with the next frame. */
  write(stream: Stream, text: string): void {
    this.pending.push([stream, text]);
    if (!this.frame) this.frame = requestAnimationFrame(() => this.flush());
  }

  flush(): void {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const pinned = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 40;
    const pending = this.pending;
    this.pending = [];
    let waiting = pending.reduce((sum, [, text]) => sum + text.length, 0);
    for (const [stream, text] of pending) {
      // What would be taken out again at once isn't put in.
      const skipped = Math.min(text.length, Math.max(0, waiting - SHOWN));
      waiting -= text.length;
      this.hidden += skipped;
      for (const piece of this.ansi[stream].take(text.slice(skipped))) this.add(stream, piece);
    }
    this.trim();
    if (pinned) this.element.scrollTop = this.element.scrollHeight;
  }

  private add(stream: Stream, piece: { text: string; color: string; background: string; classes: string[] }): void {
    for (const [index, row] of piece.text.split('\n').entries()) {
      if (index) {
        this.line.append('\n');
        this.line = this.newLine();
        this.element.append(this.line);
      }
      // A carriage return goes back to the start of the line, which is then written anew.
      const last = row.replace(/\r+$/, '').lastIndexOf('\r');
      if (last >= 0) {
        this.line.replaceChildren();
        this.length -= this.lineLength;
        this.lineLength = 0;
      }
      const text = row.slice(last + 1).replaceAll('\r', '');
      if (!text) continue;
      const room = Math.max(0, LINE - this.lineLength);
      this.hidden += Math.max(0, text.length - room);
      const shown = text.slice(0, room);
      this.lineLength += shown.length;
      this.length += shown.length;
      if (!shown) continue;
      const span = document.createElement('span');
      span.className = [stream, ...piece.classes].join(' ');
      if (piece.color) span.style.color = piece.color;
      if (piece.background) span.style.background = piece.background;
      span.textContent = shown;
      this.line.append(span);
    }
  }

  private newLine(): HTMLElement {
    const line = document.createElement('div');
    line.className = 'output-line';
    line.dir = 'auto';
    this.lineLength = 0;
    return line;
  }

  private trim(): void {
    while (this.length > SHOWN && this.notice.nextElementSibling !== this.line) {
      const first = this.notice.nextElementSibling;
      if (!first) break;
      const size = first.textContent?.length ?? 0;
      this.length -= size;
      this.hidden += size;
      first.remove();
    }
    this.notice.hidden = !this.hidden;
    if (this.hidden) {
      const hidden = this.hidden.toLocaleString('en');
      this.notice.textContent = `${hidden} characters aren’t shown here. The run’s record has all that was kept.`;
    }
  }
}

/** What a program has written, for whoever comes back to the page that shows it. */
export class Written {
  private readonly kept: [Stream, string][] = [];
  private length = 0;
  private screen: Screen | null = null;

  write(stream: Stream, text: string): void {
    this.length += text.length;
    if (this.length < KEPT) this.kept.push([stream, text]);
    this.screen?.write(stream, text);
  }

  /** Have a screen show it, and what will come. */
  showOn(screen: Screen): void {
    this.screen = screen;
    for (const [stream, text] of this.kept) screen.write(stream, text);
  }

  /** Let go of a screen that isn't seen any more. */
  leave(screen: Screen): void {
    if (this.screen === screen) this.screen = null;
  }
}

/** A screen; `onReady` gets it once, and whenever `run` is another one. Where that is `Written`, this shows it. */
export function Output({ run, onReady, label }: { run: unknown; onReady?: (screen: Screen) => void; label: string }) {
  const element = useRef<HTMLPreElement>(null);
  const ready = useRef(onReady);
  ready.current = onReady;
  useEffect(() => {
    if (!element.current) return;
    const screen = new Screen(element.current);
    ready.current?.(screen);
    if (!(run instanceof Written)) return;
    run.showOn(screen);
    return () => run.leave(screen);
  }, [run]);
  // biome-ignore lint/a11y/noNoninteractiveTabindex: a region that scrolls must be reached by the keyboard
  return <pre class="output" ref={element} tabIndex={0} role="region" aria-label={label} />;
}

/** Output that is there already. */
export function Printed({ text, stream = 'stdout', label }: { text: string; stream?: Stream; label: string }) {
  return (
    <Output
      key={text.length}
      run={text}
      label={label}
      onReady={(screen) => {
        screen.write(stream, text);
        screen.flush();
      }}
    />
  );
}
