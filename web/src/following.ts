/** A run that is started here, and followed to its end, also where the connection breaks. */

import { ApiError, at, events, send } from './api.ts';
import type { RunEnd } from './types.ts';
import type { Written } from './ui/output.tsx';

const AGAIN_MS = 1000;

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
  let runId = '';
  let after = '';
  let response: Response | null = null;
  while (true) {
    try {
      if (runId) response ??= await send(at(session, 'runs', runId, 'events'), { query: { after } });
      else response = await send(at(session, 'stream'), { json: asked() });
      runId ||= response.headers.get('X-Era-Run') ?? '';
      put({ runId });
      for await (const { id, data } of events(response)) {
        after = id || after;
        if (data.type === 'stdout' || data.type === 'stderr') written.write(data.type, String(data.content));
        else if (data.type === 'gap') written.write('stderr', '\n[some output isn’t kept any more]\n');
        else if (data.type === 'done') return put({ end: data as unknown as RunEnd, running: false });
        else if (data.type === 'error') throw new ApiError(0, { error: String(data.error) });
      }
      if (!runId) throw new ApiError(0, { error: 'The stream ended before the run did.' });
    } catch (error) {
      // The run goes on without a connection, and its record has what comes meanwhile.
      if (!runId || (error instanceof ApiError && error.status < 500)) {
        return put({ error: error as Error, running: false });
      }
    }
    response = null;
    await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}
