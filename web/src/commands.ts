/** What can be done here by name or key: the palette lists it, `?` shows the keys. */

import { signal } from '@preact/signals';
import { useLayoutEffect } from 'preact/hooks';

export interface Command {
  title: string;
  /** A key, or two one after the other (`g s`). */
  keys?: string;
  group: string;
  run: () => void;
}

const groups = signal<Map<object, Command[]>>(new Map());

/** Offer commands while a component is there: from the moment that it can be seen, which an effect would be too late for. */
export function useCommands(commands: Command[], inputs: unknown[]): void {
  useLayoutEffect(() => {
    const owner = {};
    groups.value = new Map(groups.value).set(owner, commands);
    return () => {
      const without = new Map(groups.value);
      without.delete(owner);
      groups.value = without;
    };
  }, inputs);
}

export function allCommands(): Command[] {
  return [...groups.value.values()].flat();
}

export const paletteOpen = signal(false);
export const helpOpen = signal(false);

/** Whether keys are text here. The editor is in a shadow root, so it is the event's path that tells. */
function isTyping(event: KeyboardEvent): boolean {
  return event
    .composedPath()
    .some(
      (element) =>
        element instanceof HTMLElement &&
        (element.isContentEditable ||
          /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName) ||
          element.dataset.keys === 'own'),
    );
}

let first = '';
let firstAt = 0;

window.addEventListener('keydown', (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === 'k' && !event.shiftKey && !event.altKey) {
    event.preventDefault();
    paletteOpen.value = !paletteOpen.value;
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event) || document.querySelector('dialog[open]'))
    return;
  if (event.key === '?') {
    event.preventDefault();
    helpOpen.value = true;
    return;
  }
  const sequence = Date.now() - firstAt < 1200 && first ? `${first} ${event.key}` : event.key;
  const command = allCommands().find((each) => each.keys === sequence);
  if (command) {
    event.preventDefault();
    first = '';
    command.run();
  } else if (event.key.length === 1) {
    first = event.key;
    firstAt = Date.now();
  }
});
