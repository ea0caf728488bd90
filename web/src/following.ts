/** A run that is started here, and followed to its end, also where the connection breaks. */

import { ApiError, at, events, send, Unreachable } from './api.ts';
import type { RunEnd } from './types.ts';
import type { Stream } from './ui/output.tsx';

const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15_000;
const TRIES = 6;

export interface Followed {
  running: boolean;
  runId: string;
  end: RunEnd | null;
  error: Error | undefined;
}

export const NOT_RUN: Followed = { running: false, runId: '', end: null, error: undefined };

/** Takes what a run writes, and the events of what its cell shows. */
export interface RunOutput {
  write(stream: Stream, text: string): void;
  show?(event: Record<string, unknown>): void;
}

/** Run what `asked` gives. What the program writes goes to `written`; `put` is told how it goes, to its end. */
export async function follow(
  session: string,
  asked: () => object,
  written: RunOutput,
  put: (changed: Partial<Followed>) => void,
): Promise<void> {
  put({ ...NOT_RUN, running: true });
  let runId = '';
  let after = '';
  let failures = 0;
  let response: Response | null = null;
  while (true) {
    try {
      if (runId) response ??= await send(at(session, 'runs', runId, 'events'), { query: { after } });
      else response = await send(at(session, 'stream'), { json: asked() });
      runId ||= response.headers.get('X-Era-Run') ?? '';
      put({ runId });
      for await (const { id, data } of events(response)) {
        if (id && id !== after) failures = 0;
        after = id || after;
        if (data.type === 'stdout' || data.type === 'stderr') written.write(data.type, String(data.content));
        else if (data.type === 'gap') written.write('stderr', '\n[some output isn’t kept any more]\n');
        else if (data.type === 'done') return put({ end: data as unknown as RunEnd, running: false });
        else if (data.type === 'error') throw errorOf(data);
        else written.show?.(data);
      }
      throw new ApiError(503, { error: 'The stream ended before the run did. Its record says how it went.' });
    } catch (error) {
      // The run goes on without a connection, and its record has what comes meanwhile.
      failures = error instanceof Unreachable ? 0 : failures + 1;
      if (!runId || !mayPass(error, failures)) return put({ error: error as Error, running: false });
    }
    response = null;
    const pause = Math.min(FIRST_PAUSE_MS * 2 ** Math.max(0, failures - 1), LONGEST_PAUSE_MS);
    await new Promise((done) => setTimeout(done, pause));
  }
}

/** Codes of errors in streams that say nothing of the run. */
const PASSING: ReadonlySet<string> = new Set(['unavailable', 'no_lease', 'not_ready', 'home_unreachable']);

function errorOf({ error, code, hint }: Record<string, unknown>): ApiError {
  const body = { error: String(error), code: String(code), hint: String(hint ?? '') };
  return new ApiError(PASSING.has(body.code) ? 503 : 0, body);
}

/** Whether another try may get on, after so many failures one after the other. As long as the server is away it may. */
function mayPass(error: unknown, failures: number): boolean {
  if (error instanceof Unreachable) return true;
  if (!(error instanceof ApiError) || failures >= TRIES) return false;
  return error.status >= 500 || error.status === 408 || error.status === 429;
}
