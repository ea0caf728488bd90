/** The server's metrics, sampled while the dashboard is open. */

import { signal } from '@preact/signals';
import { send } from '../api.ts';

const EVERY_MS = 3000;
const KEPT = 400;

export interface Sample {
  at: number;
  values: Map<string, number>;
}

export const samples = signal<Sample[]>([]);
export const metricsError = signal<Error | undefined>(undefined);

/** Values of Prometheus' text format, by name with labels. */
export function parsed(text: string): Map<string, number> {
  const values = new Map<string, number>();
  for (const line of text.split('\n')) {
    if (!line || line.startsWith('#')) continue;
    const match = /^([a-zA-Z_:][\w:]*(?:\{.*\})?)\s+(\S+)/.exec(line);
    if (match?.[1]) values.set(match[1], Number(match[2]));
  }
  return values;
}

let timer: ReturnType<typeof setInterval> | undefined;

async function sample(): Promise<void> {
  if (document.hidden) return;
  try {
    const text = await (await send('/metrics')).text();
    samples.value = [...samples.value, { at: Date.now() / 1000, values: parsed(text) }].slice(-KEPT);
    metricsError.value = undefined;
  } catch (error) {
    metricsError.value = error as Error;
  }
}

/** Begin to sample, once; it goes on until the page is closed, so that plots have a past. */
export function startSampling(): void {
  if (timer) return;
  timer = setInterval(() => void sample(), EVERY_MS);
  void sample();
}

/** The sum of all metrics with a name, whatever their labels; or of those whose labels contain a text. */
export function total(values: Map<string, number>, name: string, label = ''): number | null {
  let sum: number | null = null;
  for (const [key, value] of values) {
    if ((key === name || key.startsWith(`${name}{`)) && key.includes(label)) sum = (sum ?? 0) + value;
  }
  return sum;
}
