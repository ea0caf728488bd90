/**
 * Terminal output as inert text with colours.
 *
 * Of all escape sequences only those of colours and weights (SGR) have an effect; the others are taken out, whatever
 * they ask for. Text is only ever a text node. Nothing is kept of a sequence that is longer than any real one.
 */

interface Style {
  color: string;
  background: string;
  classes: Set<string>;
}

export interface Piece {
  text: string;
  /** A CSS colour, or ''. */
  color: string;
  background: string;
  classes: string[];
}

const NAMES = ['black', 'red', 'green', 'yellow', 'blue', 'magenta', 'cyan', 'white'];
// An escape sequence: CSI, a string (OSC, DCS, APC, PM, SOS) up to its end, or a short one. Control characters besides.
// No character is in two classes that follow each other, or hostile output would take quadratic time.
const SEQUENCE =
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  /\x1b\[([0-?]*)([ -/]*)([@-~])|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-Z\\^-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]/g;
// biome-ignore lint/suspicious/noControlCharactersInRegex: it is what is looked for
const UNFINISHED = /\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)?$/;
const LONGEST = 4096;

export class Ansi {
  private style: Style = { color: '', background: '', classes: new Set() };
  private rest = '';

  /** The pieces of a text that goes on where the last one ended. */
  take(text: string): Piece[] {
    let all = this.rest + text;
    this.rest = '';
    const open = UNFINISHED.exec(all.slice(-LONGEST));
    if (open) {
      this.rest = open[0];
      all = all.slice(0, all.length - open[0].length);
    }
    const pieces: Piece[] = [];
    let from = 0;
    for (const match of all.matchAll(SEQUENCE)) {
      this.add(pieces, all.slice(from, match.index));
      from = match.index + match[0].length;
      if (match[3] === 'm' && !match[2]) this.select(match[1] ?? '');
    }
    this.add(pieces, all.slice(from));
    return pieces;
  }

  private add(pieces: Piece[], text: string): void {
    if (!text) return;
    const { color, background, classes } = this.style;
    const inverse = classes.has('inverse');
    pieces.push({
      text,
      color: inverse ? background || 'var(--output)' : color,
      background: inverse ? color || 'var(--ink)' : background,
      classes: [...classes].filter((name) => name !== 'inverse'),
    });
  }

  private select(parameters: string): void {
    if (/[?<=>]/.test(parameters)) return;
    const codes = parameters.split(/[;:]/).map(Number);
    const { style } = this;
    for (let at = 0; at < codes.length; at++) {
      const code = codes[at] ?? 0;
      if (code === 0) this.style = Object.assign(style, { color: '', background: '', classes: new Set<string>() });
      else if (code === 1) style.classes.add('bold');
      else if (code === 2) style.classes.add('dim');
      else if (code === 3) style.classes.add('italic');
      else if (code === 4) style.classes.add('underline');
      else if (code === 7) style.classes.add('inverse');
      else if (code === 9) style.classes.add('struck');
      else if (code === 22) this.without('bold', 'dim');
      else if (code === 23) this.without('italic');
      else if (code === 24) this.without('underline');
      else if (code === 27) this.without('inverse');
      else if (code === 29) this.without('struck');
      else if (code >= 30 && code <= 37) style.color = named(code - 30);
      else if (code === 39) style.color = '';
      else if (code >= 40 && code <= 47) style.background = named(code - 40);
      else if (code === 49) style.background = '';
      else if (code >= 90 && code <= 97) style.color = named(code - 90);
      else if (code >= 100 && code <= 107) style.background = named(code - 100);
      else if (code === 38 || code === 48) {
        const color = codes[at + 1] === 5 ? indexed(codes[at + 2] ?? 0) : exact(codes.slice(at + 2, at + 5));
        at += codes[at + 1] === 5 ? 2 : 4;
        if (code === 38) style.color = color;
        else style.background = color;
      }
    }
  }

  private without(...names: string[]): void {
    for (const name of names) this.style.classes.delete(name);
  }
}

function named(index: number): string {
  return `var(--ansi-${NAMES[index]})`;
}

function exact([red = 0, green = 0, blue = 0]: number[]): string {
  const [r, g, b] = [red, green, blue].map((part) => Math.min(255, part | 0));
  return `rgb(${r} ${g} ${b})`;
}

/** A colour of the 256 that terminals number. */
function indexed(index: number): string {
  if (index < 8) return named(index);
  if (index < 16) return named(index - 8);
  if (index >= 232) return exact([0, 0, 0].map(() => 8 + (Math.min(index, 255) - 232) * 10));
  const steps = [0, 95, 135, 175, 215, 255];
  const at = index - 16;
  return exact([steps[Math.floor(at / 36)] ?? 0, steps[Math.floor(at / 6) % 6] ?? 0, steps[at % 6] ?? 0]);
}
