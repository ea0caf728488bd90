/** Loading from the API, again after the server was away, and timers. */

import { useCallback, useEffect, useRef, useState } from 'preact/hooks';
import { returns } from './api.ts';

/** After so long a call is given up for another one: its connection may be dead without a word. */
const HUNG_MS = 30_000;

export interface Loaded<T> {
  value: T | undefined;
  error: Error | undefined;
  loading: boolean;
  reload: () => Promise<void>;
  /** Load it again, unless that is under way and not hung: a server may take longer than the time between two calls of this. */
  refresh: () => Promise<void>;
  set: (value: T) => void;
}

/**
 * What `load` gives; loaded again when `inputs` change, which makes it another thing, when `signs` of a change of the same
 * thing do, and when the server is back. Meanwhile the last value of the same thing stays.
 */
export function useLoad<T>(
  load: (signal: AbortSignal) => Promise<T>,
  inputs: unknown[],
  signs: unknown[] = [],
): Loaded<T> {
  const [state, setState] = useState<{ value?: T; error?: Error; loading: boolean; inputs: string }>({
    loading: true,
    inputs: JSON.stringify(inputs),
  });
  const running = useRef<AbortController | null>(null);
  const began = useRef(0);
  const inputsNow = JSON.stringify(inputs);
  const signsNow = JSON.stringify(signs);
  const epoch = returns.value;
  const latest = useRef(load);
  latest.current = load;

  const reload = useCallback(async () => {
    running.current?.abort();
    const controller = new AbortController();
    running.current = controller;
    began.current = Date.now();
    setState((before) => ({
      value: before.inputs === inputsNow ? before.value : undefined,
      error: before.inputs === inputsNow ? before.error : undefined,
      loading: true,
      inputs: inputsNow,
    }));
    try {
      const value = await latest.current(controller.signal);
      if (!controller.signal.aborted) setState({ value, loading: false, inputs: inputsNow });
    } catch (error) {
      if (controller.signal.aborted) return;
      setState((before) => ({ ...before, error: error as Error, loading: false, inputs: inputsNow }));
    } finally {
      if (running.current === controller) running.current = null;
    }
  }, [inputsNow]);

  useEffect(() => {
    void reload();
    return () => running.current?.abort();
  }, [reload, epoch, signsNow]);

  const refresh = useCallback(async () => {
    if (!running.current || Date.now() - began.current > HUNG_MS) await reload();
  }, [reload]);
  const set = useCallback(
    (value: T) => {
      running.current?.abort(); // what it brings is older
      setState({ value, loading: false, inputs: inputsNow });
    },
    [inputsNow],
  );
  const current = state.inputs === inputsNow ? state : { value: undefined, error: undefined, loading: true };
  return { value: current.value, error: current.error, loading: current.loading, reload, refresh, set };
}

/** Call `act` every so often while the page is seen; null: not at all. */
export function useInterval(act: () => void, milliseconds: number | null): void {
  const latest = useRef(act);
  latest.current = act;
  useEffect(() => {
    if (milliseconds === null) return;
    const timer = setInterval(() => {
      if (!document.hidden) latest.current();
    }, milliseconds);
    return () => clearInterval(timer);
  }, [milliseconds]);
}

/** A function for buttons: it says whether it is under way, and keeps its error until the next try. */
export function useAction<A extends unknown[]>(
  act: (...given: A) => Promise<void>,
): { run: (...given: A) => Promise<boolean>; busy: boolean; error: Error | undefined; clear: () => void } {
  const [state, setState] = useState<{ busy: boolean; error?: Error }>({ busy: false });
  const latest = useRef(act);
  latest.current = act;
  const underWay = useRef(false);
  const run = useCallback(async (...given: A) => {
    if (underWay.current) return false; // a key pressed twice makes nothing twice
    underWay.current = true;
    setState({ busy: true });
    try {
      await latest.current(...given);
      setState({ busy: false });
      return true;
    } catch (error) {
      setState({ busy: false, error: error as Error });
      return false;
    } finally {
      underWay.current = false;
    }
  }, []);
  return { run, busy: state.busy, error: state.error, clear: useCallback(() => setState({ busy: false }), []) };
}
