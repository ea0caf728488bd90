/** The code of a session: the editor, and what a run of it writes and leaves. */

import { useSignal } from '@preact/signals';
import { ApiError, at, call } from '../api.ts';
import { useCommands } from '../commands.ts';
import { draftOf, draftSaved } from '../drafts.ts';
import { type Followed, follow, NOT_RUN } from '../following.ts';
import { brief, bytes } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { Kept } from '../kept.ts';
import { FIRST } from '../languages.ts';
import { href } from '../router.ts';
import { Button, Check, Problem, Status, TextArea, TextField } from '../ui/basics.tsx';
import { confirm, say, sayError } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Icon } from '../ui/icons.tsx';
import { Output, Written } from '../ui/output.tsx';
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

// The last run of each session, for whoever comes back to the tab, also while it lasts.
const lastRuns = new Kept<Followed & { written: Written | null }>(() => ({ ...NOT_RUN, written: null }));

export function RunTab({ session, reload }: TabProps) {
  const load = (signal?: AbortSignal) =>
    call<{ code: string }>(at(session.id, 'code'), { signal }).catch((error) => {
      if (error instanceof ApiError && error.status === 404) return { code: '' };
      throw error;
    });
  const stored = useLoad(load, [session.id]);
  const draft = draftOf(`code/${session.id}`);
  const last = lastRuns.of(session.id);
  const options = useSignal({ args: '', stdin: '', env: '', timeout: '', atomic: false });
  const text = () => draft.value?.text ?? stored.value?.code ?? '';

  const type = (typed: string) => {
    const now = stored.value?.code ?? '';
    draft.value = typed === now ? undefined : { text: typed, base: draft.value?.base ?? now };
  };
  const put = async (code: string) => {
    await call(at(session.id, 'code'), { method: 'PUT', json: { code } });
    stored.set({ code });
    draftSaved(draft, code, code);
    say('The code is stored.');
    await reload();
  };
  const save = useAction(async () => {
    if (!draft.value) return;
    const { text: code, base } = draft.value;
    const now = await load();
    if (now.code === base || now.code === code) return put(code);
    confirm({
      title: 'The code has changed meanwhile',
      text: <p>Somebody else has stored other code since you began. Storing yours replaces that.</p>,
      verb: 'Replace it',
      act: () => put(code),
    });
  });

  const run = async () => {
    if (last.value.running) return;
    const code = text();
    const { args, stdin, env, timeout, atomic } = options.value;
    const written = new Written();
    const asked = () => ({
      code,
      ...(args.trim() ? { args: args.trim().split(/\s+/) } : {}),
      ...(stdin ? { stdin } : {}),
      ...(env.trim() ? { env: variablesOf(env) } : {}),
      ...(timeout ? { timeout: Number(timeout) } : {}),
      ...(atomic ? { atomic } : {}),
    });
    await follow(session.id, asked, written, (changed) => {
      last.value = { ...last.value, ...changed, written };
    });
    await reload();
  };
  const stop = async () => {
    try {
      await call(at(session.id, 'runs', last.value.runId), { method: 'DELETE' });
    } catch (error) {
      sayError(error);
    }
  };
  useCommands(
    [
      { title: 'Run the code', keys: 'r', group: 'Do', run: () => void run() },
      { title: 'Store the code', group: 'Do', run: () => void save.run() },
    ],
    [session.id, stored.value],
  );
  const { end, error, running, written, runId } = last.value;
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
            disabled={running || !text().trim()}
            onClick={() => void run()}
            title="Ctrl Enter"
          >
            Run
          </Button>
          <Button icon="check" busy={save.busy} disabled={!draft.value} onClick={() => void save.run()} title="Ctrl S">
            {draft.value ? 'Store' : 'Stored'}
          </Button>
          {!text() && stored.value && FIRST[session.language] && (
            <Button kind="quiet" onClick={() => type(FIRST[session.language] ?? '')}>
              Insert an example
            </Button>
          )}
        </div>
        <Problem error={stored.error ?? save.error} />
        <CodeEditor
          text={text()}
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
        {written ? (
          <Output run={written} label="Output of the run" />
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
                <Icon name="data" /> <bdi>{brief(end.data, 160)}</bdi>
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
