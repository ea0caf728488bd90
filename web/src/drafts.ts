/** What was typed and not saved yet. It outlives a change of the page, an error, and a server that is away. */

import type { Signal } from '@preact/signals';
import { Kept } from './kept.ts';

export interface Draft {
  text: string;
  /** What there was when the typing began, or its ETag or version: a save must not replace anything else unasked. */
  base: string | number;
}

const drafts = new Kept<Draft | undefined>(() => undefined);

export function draftOf(name: string): Signal<Draft | undefined> {
  return drafts.of(name);
}

/** A text was saved, as `base`. What was typed meanwhile stays, and goes on from there. */
export function draftSaved(draft: Signal<Draft | undefined>, text: string, base: string | number): void {
  if (draft.value) draft.value = draft.value.text === text ? undefined : { ...draft.value, base };
}

window.addEventListener('beforeunload', (event) => {
  if (drafts.values().some(Boolean)) event.preventDefault();
});
