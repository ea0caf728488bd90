/** A run that is started here, and followed to its end. */

import { at, events, send } from './api.ts';
import type { RunEnd } from './types.ts';
import type { Written } from './ui/output.tsx';

export interface Followed {
  running: boolean;
  runId: string;
  end: RunEnd | null;
  error: Error | undefined;
}

export const NOT_RUN: Followed = { running: false, runId: '', end: null, error: undefined };

/** Run what `asked` gives. What the program writes goes to `written`; `put` is told how it goes, to its end. */
export async function follow(
  session: string,
  asked: () => object,
  written: Written,
  put: (changed: Partial<Followed>) => void,
): Promise<void> {
  put({ ...NOT_RUN, running: true });
  let ended = false;
  try {
    const response = await send(at(session, 'stream'), { json: asked() });
    put({ runId: response.headers.get('X-Era-Run') ?? '' });
    for await (const { data } of events(response)) {
      if (data.type === 'stdout' || data.type === 'stderr') written.write(data.type, String(data.content));
      else if (data.type === 'done') put({ end: data as unknown as RunEnd });
      else if (data.type === 'error') put({ error: new Error(String(data.error)) });
      ended ||= data.type === 'done' || data.type === 'error';
    }
    if (!ended) throw new Error('The stream ended before the run did. Its record says how it went.');
  } catch (error) {
    put({ error: error as Error });
  }
  put({ running: false });
}
