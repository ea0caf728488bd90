/** The output of a notebook's cell: text and what the cell shows, in the order in which it comes. */

import { signal } from '@preact/signals';
import type { RunOutput } from '../following.ts';
import type { CellResult } from '../types.ts';
import { type Stream, Written } from '../ui/output.tsx';

type Bundle = Pick<CellResult, 'data'>;

/** Text up to the next thing that is shown, or a thing that is shown. */
export type Part =
  | { serial: number; text: Written; shown?: undefined; displayId?: undefined }
  | { serial: number; text?: undefined; shown: Bundle; displayId: unknown };

export class CellOutput implements RunOutput {
  /** Changed at most once a frame. */
  readonly parts = signal<readonly Part[]>([]);
  private readonly onUpdate: (displayId: unknown, shown: Bundle) => void;
  private latest: Part[] = [];
  private serial = 0;
  private frame = 0;
  /** What there is goes with the next that comes. */
  private clears = false;

  /** `onUpdate` passes a new value of a display on to each cell that may have shown it. */
  constructor(onUpdate: (displayId: unknown, shown: Bundle) => void) {
    this.onUpdate = onUpdate;
  }

  write(stream: Stream, text: string): void {
    this.clearIfAsked();
    let written = this.latest.at(-1)?.text;
    if (!written) {
      written = new Written();
      this.add({ serial: this.serial++, text: written });
    }
    written.write(stream, text);
  }

  /** Take an event of a run in a context (docs/contexts.md). */
  show(event: Record<string, unknown>): void {
    const shown = { data: (event.data ?? {}) as CellResult['data'] };
    switch (event.type) {
      case 'display':
      case 'result':
        this.clearIfAsked();
        this.add({ serial: this.serial++, shown, displayId: event.display_id });
        break;
      case 'update_display':
        this.onUpdate(event.display_id, shown);
        break;
      case 'clear_output':
        this.clears = true;
        if (event.wait !== true) this.clearIfAsked();
        break;
      case 'cell_error': {
        // The interpreter writes it to stderr, too, unless the program has put something else there.
        const traceback = String(event.traceback);
        if (!this.latest.some(({ text }) => text?.has('stderr', traceback))) this.write('stderr', `${traceback}\n`);
      }
    }
  }

  /** Show something else in place of what has this display id. */
  update(displayId: unknown, shown: Bundle): void {
    if (!this.latest.some((part) => part.shown && part.displayId === displayId)) return;
    this.latest = this.latest.map((part) => (part.shown && part.displayId === displayId ? { ...part, shown } : part));
    this.changed();
  }

  private add(part: Part): void {
    this.latest.push(part);
    this.changed();
  }

  private clearIfAsked(): void {
    if (!this.clears) return;
    this.clears = false;
    this.latest = [];
    this.changed();
  }

  private changed(): void {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.parts.value = [...this.latest];
    });
  }
}
