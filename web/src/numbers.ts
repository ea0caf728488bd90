/** JSON whose numbers stay what they are, also those that JavaScript has no room for. */

// Not in TypeScript's libraries yet.
declare global {
  interface JSON {
    rawJSON?(text: string): object;
    isRawJSON?(value: unknown): value is { rawJSON: string };
    parse(text: string, reviver: (key: string, value: unknown, context?: { source?: string }) => unknown): unknown;
  }
}

/**
 * Parse JSON. Whole numbers beyond 2^53 become objects that are written as they were read; with `exact`, so do all
 * numbers that JavaScript would write in another way, such as 1.0. Throws an Error where the browser can't do that.
 */
export function parsed(text: string, exact = false): unknown {
  if (!exact && !/\d{16}/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, context?: { source?: string }) => {
    if (typeof value !== 'number') return value;
    const source = context?.source; // which older browsers don't tell
    if (source === undefined) {
      if (exact && Number.isInteger(value) && !Number.isSafeInteger(value)) throw new Error(cannotKeep(String(value)));
      return value;
    }
    const changes = exact ? String(value) !== source : /^-?\d+$/.test(source) && !Number.isSafeInteger(value);
    if (!changes) return value;
    if (JSON.rawJSON) return JSON.rawJSON(source);
    if (exact) throw new Error(cannotKeep(source));
    return value;
  });
}

const cannotKeep = (number: string) =>
  `This browser can’t keep the number ${number} as it is. Use another one to edit it.`;

/** The digits of a number that `parsed` has kept; null for everything else. */
export function digits(value: unknown): string | null {
  return JSON.isRawJSON?.(value) ? value.rawJSON : null;
}
