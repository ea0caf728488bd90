/** Signals by name that outlive the components which show them: each that comes later goes on with the same one. */

import { type Signal, signal } from '@preact/signals';

export class Kept<T> {
  private readonly signals = new Map<string, Signal<T>>();
  private readonly first: () => T;

  constructor(first: () => T) {
    this.first = first;
  }

  of(name: string): Signal<T> {
    const found = this.signals.get(name) ?? signal(this.first());
    this.signals.set(name, found);
    return found;
  }

  values(): T[] {
    return [...this.signals.values()].map((each) => each.peek());
  }
}
