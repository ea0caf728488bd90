/** What a program writes, as it comes: inert, with its colours, and bounded, so that no output can stop the page. */

import { useEffect, useRef } from 'preact/hooks';
import { Ansi } from '../ansi.ts';

const SHOWN = 400_000;
const LINES = 20_000;
/** The longest line that is shown, in characters, as all of these but LINES. */
const LINE = 20_000;
const KEPT = 200_000;

export type Stream = 'stdout' | 'stderr';

/** Text in a <pre>. It is kept out of Preact: thousands of small pieces would each cost a comparison. */
export class Screen {
  private readonly ansi: { [stream in Stream]: Ansi } = { stdout: new Ansi(), stderr: new Ansi() };
  private readonly element: HTMLElement;
  private readonly notice: HTMLElement;
  private line: HTMLElement;
  private lineLength = 0;
  private lines = 1;
  /** Whether a carriage return came last, so that the line is written anew if anything but a line's end follows. */
  private returned = false;
  private length = 0;
  private hidden = 0;
  private pending: [Stream, string][] = [];
  private waiting = 0;
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
    this.waiting += text.length;
    if (this.waiting > 2 * SHOWN)
      this.flush(); // a page that isn't seen has no frames
    else if (!this.frame) this.frame = requestAnimationFrame(() => this.flush());
  }

  flush(): void {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const pinned = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 40;
    const pending = this.pending;
    this.pending = [];
    this.waiting = 0;
    const starts = beginnings(pending.map(([, text]) => text));
    for (const [index, [stream, text]] of pending.entries()) {
      const start = starts[index] ?? 0;
      this.hidden += start;
      for (const piece of this.ansi[stream].take(text.slice(start))) this.add(stream, piece);
    }
    this.trim();
    if (pinned) this.element.scrollTop = this.element.scrollHeight;
  }

  /** So many characters aren't shown. */
  hide(characters: number): void {
    this.hidden += characters;
  }

  private add(stream: Stream, piece: { text: string; color: string; background: string; classes: string[] }): void {
    for (const [index, row] of piece.text.split('\n').entries()) {
      if (index) {
        this.line.append('\n');
        this.length++;
        this.lines++;
        this.returned = false;
        this.line = this.newLine();
        this.element.append(this.line);
      }
      // A carriage return goes back to the start of the line, which is written anew by what comes next, if that isn't
      // the line's end.
      let end = row.length;
      while (end && row[end - 1] === '\r') end--;
      const last = end ? row.lastIndexOf('\r', end - 1) : -1;
      if (end && (last >= 0 || this.returned)) {
        this.line.replaceChildren();
        this.length -= this.lineLength;
        this.lineLength = 0;
      }
      if (row) this.returned = end < row.length;
      const text = row.slice(last + 1, end);
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
    while ((this.length > SHOWN || this.lines > LINES) && this.notice.nextElementSibling !== this.line) {
      const first = this.notice.nextElementSibling;
      if (!first) break;
      const size = first.textContent?.length ?? 0;
      this.length -= size;
      this.hidden += size;
      this.lines--;
      first.remove();
    }
    this.notice.hidden = !this.hidden;
    if (this.hidden) {
      const hidden = this.hidden.toLocaleString('en');
      this.notice.textContent = `${hidden} characters aren’t shown here. The run’s record has all that was kept.`;
    }
  }
}

/** Where in each of these texts that begins which is shown: what would be taken out again at once isn't put in. */
function beginnings(texts: string[]): number[] {
  let characters = SHOWN;
  let lines = LINES;
  const starts = texts.map(() => 0);
  for (let at = texts.length - 1; at >= 0; at--) {
    const text = texts[at] ?? '';
    let start = Math.max(0, text.length - characters);
    for (let end = text.length; end > start; ) {
      end = text.lastIndexOf('\n', end - 1);
      if (end < start) break;
      if (--lines === 0) start = end + 1;
    }
    starts[at] = start;
    characters = start ? 0 : characters - text.length;
  }
  return starts;
}

/** The newest of what a program has written, for whoever comes back to the page that shows it. */
export class Written {
  private kept: [Stream, string][] = [];
  private length = 0;
  private dropped = 0;
  private screen: Screen | null = null;

  write(stream: Stream, text: string): void {
    this.kept.push([stream, text]);
    this.length += text.length;
    if (this.length > 2 * KEPT) this.drop();
    this.screen?.write(stream, text);
  }

  /** Whether a text is in what is kept of a stream. */
  has(stream: Stream, text: string): boolean {
    const pieces = this.kept.filter(([of]) => of === stream).map(([, piece]) => piece);
    return pieces.join('').includes(text);
  }

  /** Have a screen show it, and what will come. */
  showOn(screen: Screen): void {
    this.screen = screen;
    screen.hide(this.dropped);
    for (const [stream, text] of this.kept) screen.write(stream, text);
  }

  /** Keep the newest KEPT characters. */
  private drop(): void {
    let from = this.kept.length;
    let length = 0;
    while (from && length < KEPT) length += this.kept[--from]?.[1].length ?? 0;
    const [stream, text] = this.kept[from] ?? ['stdout', ''];
    const rest = text.slice(Math.max(0, length - KEPT));
    this.kept = [[stream, rest], ...this.kept.slice(from + 1)];
    this.dropped += this.length - Math.min(length, KEPT);
    this.length = Math.min(length, KEPT);
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
