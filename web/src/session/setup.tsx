/** What a session has installed: what was asked for, how it goes, and exactly what is there. */

import { useSignal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';
import { at, call, events, send } from '../api.ts';
import { count } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { objectOf } from '../pages/new.tsx';
import type { Installed, Session } from '../types.ts';
import { Button, Copy, Empty, Form, Problem, Status, TextArea, Waiting } from '../ui/basics.tsx';
import { Dialog, say } from '../ui/dialog.tsx';
import { Table } from '../ui/listing.tsx';
import { Output, type Screen } from '../ui/output.tsx';
import type { TabProps } from './page.tsx';

const EXAMPLE = `{
  "pip": ["requests>=2.32"],
  "commands": ["mkdir -p data"],
  "envs": {"STAGE": "test"}
}`;

function SetupDialog({
  session,
  set,
  onClose,
}: {
  session: Session;
  set: (session: Session) => void;
  onClose: () => void;
}) {
  const text = useSignal(session.setup ? JSON.stringify(session.setup, null, 2) : '');
  const save = useAction(async () => {
    const setup = text.value.trim() ? objectOf('The setup', text.value) : null;
    const answer = await call<{ metadata: Session }>(at(session.id), { method: 'PATCH', json: { setup } });
    set(answer.metadata);
    say(setup ? 'The setup begins.' : 'The setup was removed.');
    onClose();
  });
  return (
    <Dialog title="Setup" onClose={onClose} wide>
      <Form onSubmit={() => void save.run()}>
        <TextArea
          label="What to install, as JSON"
          hint="pip, npm, go: lists of packages. commands: lines for the shell. envs: variables of every run. Empty: nothing."
          rows={12}
          placeholder={EXAMPLE}
          value={text.value}
          onText={(typed) => {
            text.value = typed;
          }}
        />
        <Problem error={save.error} />
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" type="submit" busy={save.busy}>
            Install
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

function Progress({ session, reload }: { session: Session; reload: () => Promise<void> }) {
  const screen = useRef<Screen | null>(null);
  const controller = useRef<AbortController | null>(null);
  useEffect(() => () => controller.current?.abort(), []);
  const follow = async (ready: Screen) => {
    screen.current = ready;
    controller.current?.abort();
    controller.current = new AbortController();
    try {
      const response = await send(at(session.id, 'setup', 'events'), { signal: controller.current.signal });
      for await (const { data } of events(response)) {
        if (data.type === 'line') ready.write('stdout', `${String(data.text ?? '')}\n`);
      }
    } catch {
      // The session's status tells how it went; the lines are an extra.
    }
    if (!controller.current.signal.aborted) await reload();
  };
  return <Output run={session.id} label="Progress of the setup" onReady={(ready) => void follow(ready)} />;
}

export function SetupTab({ session, set, reload }: TabProps) {
  const editing = useSignal(false);
  const installed = useLoad(
    (signal) => call<Installed>(at(session.id, 'environment'), { signal }),
    [session.id, session.setup_status ?? '', JSON.stringify(session.setup)],
  );
  const again = useAction(async () => {
    set(await call<Session>(at(session.id, 'setup'), { method: 'POST' }));
  });
  const going = session.setup_status === 'pending' || session.setup_status === 'running';
  const result = session.setup_result;
  const lock = installed.value;
  const packages = lock
    ? (['pip', 'npm', 'go'] as const).flatMap((kind) => lock[kind].map((each) => ({ kind, ...each })))
    : [];
  const edit = () => {
    editing.value = true;
  };

  return (
    <div class="columns">
      <section>
        <header class="section-head wrap">
          <h2>Setup</h2>
          {session.setup_status && <Status>{session.setup_status}</Status>}
          <span class="push" />
          {session.setup && (
            <Button icon="refresh" busy={again.busy} disabled={going} onClick={() => void again.run()}>
              Install again
            </Button>
          )}
          <Button icon="edit" onClick={edit}>
            Change
          </Button>
        </header>
        <Problem error={again.error} />
        {session.setup ? (
          <pre class="output">{JSON.stringify(session.setup, null, 2)}</pre>
        ) : (
          <Empty icon="package" title="No setup">
            <p class="soft">Packages, commands and variables that every run of this session finds.</p>
            <Button onClick={edit}>Install something</Button>
          </Empty>
        )}
        {going && (
          <>
            <h3>Progress</h3>
            <Progress session={session} reload={reload} />
          </>
        )}
        {!going && result && (
          <>
            <h3>Result</h3>
            <p>
              {result.success ? 'It was installed' : 'It failed'} after {(result.duration_ms / 1000).toFixed(1)} s
              {result.commands_run.length > 0 && `, with ${count(result.commands_run.length, 'command')}`}.
            </p>
            {result.error && <pre class="output problem-output">{result.error}</pre>}
            {(result.stdout || result.stderr) && (
              <details>
                <summary>What was written</summary>
                <pre class="output">{result.stdout + result.stderr}</pre>
              </details>
            )}
          </>
        )}
      </section>
      <section>
        <header class="section-head">
          <h2>Installed</h2>
          <span class="push" />
          {packages.length > 0 && (
            <Copy
              label="Copy as a lock"
              text={packages.map((each) => `${each.name}${each.kind === 'pip' ? '==' : '@'}${each.version}`).join('\n')}
            />
          )}
        </header>
        <Problem error={installed.error} />
        {!lock && !installed.error && <Waiting />}
        {lock &&
          (packages.length ? (
            <>
              <Table columns={['Package', 'Version', 'From']}>
                {packages.map((each) => (
                  <tr key={`${each.kind}/${each.name}/${each.version}`}>
                    <td>{each.name}</td>
                    <td class="mono">{each.version}</td>
                    <td class="soft">{each.kind}</td>
                  </tr>
                ))}
              </Table>
              {lock.environment && (
                <p class="soft one-line">
                  Digest <code>{lock.environment}</code>
                </p>
              )}
            </>
          ) : (
            <p class="soft">Nothing besides what the language brings.</p>
          ))}
      </section>
      {editing.value && (
        <SetupDialog
          session={session}
          set={set}
          onClose={() => {
            editing.value = false;
          }}
        />
      )}
    </div>
  );
}
