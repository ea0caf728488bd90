/** The code of a session: the editor, and what a run of it writes and leaves. */

import { useSignal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';
import { ApiError, at, call, events, send } from '../api.ts';
import { useCommands } from '../commands.ts';
import { draft, dropDraft, keepDraft } from '../drafts.ts';
import { brief, bytes } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { FIRST } from '../languages.ts';
import { href } from '../router.ts';
import type { RunEnd } from '../types.ts';
import { Button, Check, Problem, Status, TextArea, TextField } from '../ui/basics.tsx';
import { say, sayError } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Icon } from '../ui/icons.tsx';
import { Output, type Screen } from '../ui/output.tsx';
import { Artifacts } from './artifacts.tsx';
import type { TabProps } from './page.tsx';

/** NAME=VALUE lines, as variables. */
function variablesOf(text: string): { [name: string]: string } {
  const pairs = text.split('\n').filter((line) => line.trim());
  return Object.fromEntries(
    pairs.map((line) => {
      const equals = line.indexOf('=');
      if (equals < 1) throw new Error(`'${line}' isn’t a variable: write NAME=value.`);
      return [line.slice(0, equals).trim(), line.slice(equals + 1)];
    }),
  );
}

interface Shown {
  serial: number;
  running: boolean;
  runId: string;
  end: RunEnd | null;
  error: Error | undefined;
  stopped: boolean;
}

const NOTHING: Shown = { serial: 0, running: false, runId: '', end: null, error: undefined, stopped: false };
// What the last run of each session showed, for whoever comes back to the tab. The text is bounded.
const KEPT = 200_000;
const last = new Map<string, { shown: Shown; output: ['stdout' | 'stderr', string][] }>();

export function RunTab({ session, reload }: TabProps) {
  const name = `code/${session.id}`;
  const stored = useLoad(
    (signal) =>
      call<{ code: string }>(at(session.id, 'code'), { signal }).catch((error) => {
        if (error instanceof ApiError && error.status === 404) return { code: '' };
        throw error;
      }),
    [session.id],
  );
  const text = useSignal(draft(name) ?? '');
  const touched = useSignal(draft(name) !== undefined);
  const shown = useSignal<Shown>(last.get(session.id)?.shown ?? NOTHING);
  const options = useSignal({ args: '', stdin: '', env: '', timeout: '', atomic: false });
  const screen = useRef<Screen | null>(null);
  const abort = useRef<AbortController | null>(null);

  useEffect(() => {
    if (stored.value && !touched.value) text.value = stored.value.code;
  }, [stored.value]);

  const type = (typed: string) => {
    text.value = typed;
    touched.value = typed !== (stored.value?.code ?? '');
    if (touched.value) keepDraft(name, typed);
    else dropDraft(name);
  };
  const save = useAction(async () => {
    const code = text.value;
    await call(at(session.id, 'code'), { method: 'PUT', json: { code } });
    stored.set({ code });
    touched.value = text.value !== code;
    if (!touched.value) dropDraft(name);
    say('The code is stored.');
    await reload();
  });

  const run = async () => {
    if (shown.value.running) return;
    const kept = {
      shown: { ...NOTHING, serial: Date.now(), running: true },
      output: [] as ['stdout' | 'stderr', string][],
    };
    last.set(session.id, kept);
    const put = (changed: Partial<Shown>) => {
      kept.shown = { ...kept.shown, ...changed };
      if (last.get(session.id) === kept) shown.value = kept.shown;
    };
    put({});
    let size = 0;
    const { args, stdin, env, timeout, atomic } = options.value;
    abort.current = new AbortController();
    try {
      const response = await send(at(session.id, 'stream'), {
        method: 'POST',
        signal: abort.current.signal,
        json: {
          code: text.value,
          ...(args.trim() ? { args: args.trim().split(/\s+/) } : {}),
          ...(stdin ? { stdin } : {}),
          ...(env.trim() ? { env: variablesOf(env) } : {}),
          ...(timeout ? { timeout: Number(timeout) } : {}),
          ...(atomic ? { atomic } : {}),
        },
      });
      put({ runId: response.headers.get('X-Era-Run') ?? '' });
      for await (const { data } of events(response)) {
        if (data.type === 'stdout' || data.type === 'stderr') {
          const content = String(data.content);
          size += content.length;
          if (size < KEPT) kept.output.push([data.type, content]);
          if (last.get(session.id) === kept) screen.current?.write(data.type, content);
        } else if (data.type === 'done') put({ end: data as unknown as RunEnd });
        else if (data.type === 'error') put({ error: new Error(String(data.error)) });
      }
      if (!kept.shown.end && !kept.shown.error)
        put({ error: new Error('The stream ended before the run did. Its record says how it went.') });
    } catch (error) {
      put({ error: error as Error });
    }
    put({ running: false });
    await reload();
  };
  const stop = async () => {
    try {
      await call(at(session.id, 'runs', shown.value.runId), { method: 'DELETE' });
    } catch (error) {
      sayError(error);
    }
  };
  useCommands(
    [
      { title: 'Run the code', keys: 'r', group: 'Do', run: () => void run() },
      { title: 'Store the code', group: 'Do', run: () => void save.run() },
    ],
    [session.id],
  );
  const { end, error, running, serial, runId } = shown.value;
  const set = (changed: Partial<typeof options.value>) => {
    options.value = { ...options.value, ...changed };
  };

  return (
    <div class="split">
      <div class="pane">
        <div class="pane-head">
          <Button
            kind="primary"
            icon="play"
            disabled={running || !text.value.trim()}
            onClick={() => void run()}
            title="Ctrl Enter"
          >
            Run
          </Button>
          <Button
            icon="check"
            busy={save.busy}
            disabled={!touched.value}
            onClick={() => void save.run()}
            title="Ctrl S"
          >
            {touched.value ? 'Store' : 'Stored'}
          </Button>
          {!text.value && stored.value && FIRST[session.language] && (
            <Button kind="quiet" onClick={() => type(FIRST[session.language] ?? '')}>
              Insert an example
            </Button>
          )}
        </div>
        <Problem error={stored.error ?? save.error} />
        <CodeEditor
          text={text.value}
          language={session.language}
          label="Code"
          hint="Write a program. Ctrl Enter runs it."
          onText={type}
          onRun={() => void run()}
          onSave={() => void save.run()}
        />
        <details class="pane-foot">
          <summary>Arguments, input, variables</summary>
          <div class="two">
            <TextField
              label="Arguments"
              value={options.value.args}
              onText={(args) => set({ args })}
              placeholder="--verbose input.csv"
            />
            <TextField
              label="Timeout"
              hint={`Seconds; the session’s is ${session.default_timeout}.`}
              type="number"
              min={0}
              step="any"
              value={options.value.timeout}
              onText={(timeout) => set({ timeout })}
            />
            <TextArea label="Standard input" value={options.value.stdin} onText={(stdin) => set({ stdin })} rows={3} />
            <TextArea
              label="Variables"
              hint="One NAME=value a line. They are kept nowhere."
              value={options.value.env}
              onText={(env) => set({ env })}
              rows={3}
            />
          </div>
          <Check
            label="All or nothing"
            hint="A run that fails leaves data and files as they were."
            checked={options.value.atomic}
            onChange={(atomic) => set({ atomic })}
          />
        </details>
      </div>
      <div class="pane">
        <div class="pane-head" role="status">
          {running ? (
            <Status>running</Status>
          ) : end ? (
            <>
              <Status>{end.status}</Status>
              <span>exit {end.exit_code}</span>
              <span class="soft">{end.duration}</span>
            </>
          ) : (
            <span class="soft">{error ? 'No result' : 'Output'}</span>
          )}
          <span class="push" />
          {running && (
            <Button kind="danger" icon="stop" disabled={!runId} onClick={() => void stop()}>
              Stop
            </Button>
          )}
          {!running && runId && (
            <a class="quiet-link" href={href('sessions', session.id, 'runs', runId)}>
              Record
            </a>
          )}
        </div>
        <Problem error={error} />
        {serial ? (
          <Output
            run={serial}
            label="Output of the run"
            onReady={(ready) => {
              screen.current = ready;
              for (const [stream, content] of last.get(session.id)?.output ?? []) ready.write(stream, content);
            }}
          />
        ) : (
          <div class="pane-empty">
            <Icon name="play" size={24} />
            <p>What the program writes appears here while it runs.</p>
          </div>
        )}
        {end && (
          <div class="pane-foot result">
            <p>
              {end.state.committed ? (
                <>
                  <Icon name="check" /> Version{' '}
                  <a href={href('sessions', session.id, 'versions', String(end.state.version))}>v{end.state.version}</a>{' '}
                  is in force.
                </>
              ) : (
                <>
                  <Icon name="alert" /> Nothing was committed. {end.state.reason}
                </>
              )}
            </p>
            {end.setup_error && <p class="problem-text">The setup failed: {end.setup_error}</p>}
            {end.data && (
              <p class="soft one-line">
                <Icon name="data" /> <bdi>{brief(withoutCode(end.data), 160)}</bdi>
              </p>
            )}
            <Artifacts session={session.id} artifacts={end.artifacts} more={end.artifacts_more} />
            {(end.stdout_truncated || end.stderr_truncated) && (
              <p class="soft">The output was longer than {bytes(session.limits.output_bytes)}; the rest is cut off.</p>
            )}
          </div>
        )}
      </div>
    </div>
  );
}

/** Data without the fields that the stored code adds to what clients see. */
export function withoutCode<T extends object>(data: T): T {
  const { code, code_description, code_updated_at, ...rest } = data as T & { [name: string]: unknown };
  return typeof code === 'string' && code_updated_at !== undefined ? (rest as unknown as T) : data;
}
