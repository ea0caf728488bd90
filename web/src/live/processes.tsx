/** Processes beside a session's runs: those that run and that ended, their output, input and signals. */

import { useSignal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';
import { at, call, events, send } from '../api.ts';
import { bytes, commandText, exactly } from '../format.ts';
import { useAction, useInterval, useLoad } from '../hooks.ts';
import { go, href } from '../router.ts';
import type { TabProps } from '../session/page.tsx';
import type { Process, Session } from '../types.ts';
import { Ago, Button, Check, Empty, Facts, Form, Name, Problem, Status, TextField, Waiting } from '../ui/basics.tsx';
import { confirm, Dialog, say, sayError } from '../ui/dialog.tsx';
import { Output, type Screen } from '../ui/output.tsx';

const REFRESH_MS = 2000;
const AGAIN_MS = 1000;

export function titleOfCommand(process: Process): string {
  const command = commandText(process.command);
  const isShell = process.pty && command.startsWith('exec $(command -v bash');
  return process.tag ?? (isShell ? 'shell' : command);
}

function StartDialog({ session, done }: { session: string; done: (process: Process | null) => void }) {
  const command = useSignal('');
  const tag = useSignal('');
  const stdin = useSignal(false);
  const start = useAction(async () => {
    const process = await call<Process>(at(session, 'processes'), {
      json: { command: command.value, stdin: stdin.value, ...(tag.value ? { tag: tag.value } : {}) },
    });
    done(process);
  });
  return (
    <Dialog title="Start a process" onClose={() => done(null)}>
      <Form onSubmit={() => void start.run()}>
        <TextField
          label="Command"
          hint="A line for the shell. It goes on beside the session’s runs."
          placeholder="python3 -m http.server 8000"
          value={command.value}
          onText={(text) => {
            command.value = text;
          }}
        />
        <TextField
          label="Tag"
          hint="A name for it. May be left out."
          placeholder="web"
          value={tag.value}
          onText={(text) => {
            tag.value = text;
          }}
        />
        <Check
          label="It takes input"
          checked={stdin.value}
          onChange={(checked) => {
            stdin.value = checked;
          }}
        />
        <Problem error={start.error} />
        <footer>
          <Button onClick={() => done(null)}>Cancel</Button>
          <Button kind="primary" type="submit" busy={start.busy} disabled={!command.value}>
            Start
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

function textOf(data: Record<string, unknown>): string {
  const content = String(data.content ?? '');
  if (data.encoding !== 'base64') return content;
  return new TextDecoder().decode(Uint8Array.from(atob(content), (char) => char.charCodeAt(0)));
}

/** What a process writes, followed to its end. A connection that breaks is made again, behind the last event. */
function Written({ session, process, onExit }: { session: string; process: string; onExit: () => void }) {
  const controller = useRef<AbortController | null>(null);
  useEffect(() => () => controller.current?.abort(), []);
  const follow = async (screen: Screen) => {
    const mine = new AbortController();
    controller.current?.abort();
    controller.current = mine;
    let after = '';
    while (!mine.signal.aborted) {
      try {
        const response = await send(at(session, 'processes', process, 'events'), {
          signal: mine.signal,
          query: { after },
        });
        for await (const { id, data } of events(response)) {
          after = id || after;
          if (data.type === 'exit') {
            onExit();
            return;
          }
          if (data.type === 'gap') screen.write('stderr', '\n[what came before isn’t kept any more]\n');
          else if (data.type !== 'error') screen.write(data.type === 'stderr' ? 'stderr' : 'stdout', textOf(data));
        }
      } catch (error) {
        if (mine.signal.aborted || (error as { status?: number }).status === 404) return;
      }
      await new Promise((done) => setTimeout(done, AGAIN_MS));
    }
  };
  return <Output run={process} label="Output of the process" onReady={(screen) => void follow(screen)} />;
}

function Details({ session, process, changed }: { session: string; process: Process; changed: () => void }) {
  const input = useSignal('');
  const path = at(session, 'processes', process.process_id);
  const running = process.status === 'running';
  const write = useAction(async () => {
    await call(`${path}/stdin`, { method: 'POST', body: `${input.value}\n` });
    input.value = '';
  });
  const act = async (act: () => Promise<unknown>) => {
    try {
      await act();
    } catch (error) {
      sayError(error);
    }
    changed();
  };
  const signal = (name: string) => act(() => call(`${path}/signal`, { json: { signal: name } }));
  return (
    <>
      <header class="section-head wrap">
        <h2>
          <Name>{titleOfCommand(process)}</Name>
        </h2>
        <Status>{process.status}</Status>
        <span class="push" />
        {running && process.pty && (
          <a class="button" href={href('sessions', session, 'terminal', process.process_id)}>
            Open terminal
          </a>
        )}
        {running && <Button onClick={() => void signal('INT')}>Interrupt</Button>}
        {running && (
          <Button kind="danger" icon="stop" onClick={() => void act(() => call(path, { method: 'DELETE' }))}>
            End
          </Button>
        )}
      </header>
      <Facts
        facts={[
          [
            'Command',
            <code key="c">
              <Name>{commandText(process.command)}</Name>
            </code>,
          ],
          ['Id', <code key="i">{process.process_id}</code>],
          ['Began', exactly(process.started_at)],
          ['Ended', process.ended_at ? exactly(process.ended_at) : '–'],
          ['Exit code', process.exit_code ?? '–'],
          ['Signal', process.signal ?? '–'],
          ['Written', bytes(process.output_bytes)],
          ['Why it ended', process.reason ?? '–'],
        ]}
      />
      {!process.pty && (
        <Written key={process.process_id} session={session} process={process.process_id} onExit={changed} />
      )}
      {running && process.stdin && !process.pty && (
        <Form class="input-line" onSubmit={() => void write.run()}>
          <input
            type="text"
            aria-label="Input"
            placeholder="a line of input"
            autocomplete="off"
            spellcheck={false}
            value={input.value}
            onInput={(event) => {
              input.value = event.currentTarget.value;
            }}
          />
          <Button type="submit" busy={write.busy}>
            Send
          </Button>
          <Button onClick={() => void act(() => call(`${path}/stdin`, { method: 'DELETE' }))}>End of input</Button>
        </Form>
      )}
      <Problem error={write.error} />
    </>
  );
}

export function ProcessesTab({ session, set, reload, rest }: TabProps) {
  const starting = useSignal(false);
  const list = useLoad(
    (signal) => call<{ processes: Process[] }>(at(session.id, 'processes'), { signal }),
    [session.id],
  );
  useInterval(() => void list.refresh(), REFRESH_MS);
  const processes = list.value?.processes ?? [];
  const chosen = processes.find((each) => each.process_id === rest[0]) ?? processes[0];
  const changed = () => void Promise.all([list.reload(), reload()]);
  const running = processes.some((each) => each.status === 'running');
  const begin = () => {
    starting.value = true;
  };
  return (
    <>
      {list.value && !processes.length ? (
        <Empty icon="process" title="No processes">
          <p class="soft">
            A process goes on beside the session’s runs: a server under development, a worker, a watcher. It works on
            the same files.
          </p>
          <Button kind="primary" icon="plus" onClick={begin}>
            Start a process
          </Button>
        </Empty>
      ) : (
        <div class="columns timeline-columns">
          <section>
            <header class="section-head">
              <Button kind="primary" icon="plus" onClick={begin}>
                Start
              </Button>
              <span class="push" />
              {running && (
                <Button
                  icon="stop"
                  onClick={() =>
                    confirm({
                      title: 'Stop the live session',
                      text: <p>All its processes end, and what they left becomes a version.</p>,
                      verb: 'Stop it',
                      act: async () => {
                        set(await call<Session>(at(session.id, 'stop'), { method: 'POST' }));
                        say('All processes have ended.');
                        await list.reload();
                      },
                    })
                  }
                >
                  Stop all
                </Button>
              )}
            </header>
            <Problem error={list.error} retry={() => void list.reload()} />
            {!list.value && !list.error && <Waiting />}
            <ol class="timeline" aria-label="Processes">
              {processes.map((each) => (
                <li key={each.process_id}>
                  <a
                    href={href('sessions', session.id, 'processes', each.process_id)}
                    aria-current={each === chosen ? 'true' : undefined}
                  >
                    <Status>{each.status}</Status>
                    <span class="one-line">
                      <Name>{titleOfCommand(each)}</Name>
                    </span>
                    <span class="push" />
                    <span class="soft">
                      <Ago time={each.started_at} />
                    </span>
                  </a>
                </li>
              ))}
            </ol>
          </section>
          <section>
            {chosen && <Details key={chosen.process_id} session={session.id} process={chosen} changed={changed} />}
          </section>
        </div>
      )}
      {starting.value && (
        <StartDialog
          session={session.id}
          done={(process) => {
            starting.value = false;
            if (!process) return;
            changed();
            go('sessions', session.id, 'processes', process.process_id);
          }}
        />
      )}
    </>
  );
}
