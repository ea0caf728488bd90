/** Shells of a session. Each is a process, so it goes on when the page is left, and is found again. */

import { useSignal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';
import { at, call } from '../api.ts';
import { ago } from '../format.ts';
import { useInterval, useLoad } from '../hooks.ts';
import { go } from '../router.ts';
import type { TabProps } from '../session/page.tsx';
import type { Process } from '../types.ts';
import { Button, Problem, Select } from '../ui/basics.tsx';
import { sayError } from '../ui/dialog.tsx';
import { Icon } from '../ui/icons.tsx';
import { theme } from '../ui/theme.ts';
import { titleOfCommand } from './processes.tsx';
import type { Followed, Shell } from './xterm.ts';

const REFRESH_MS = 4000;

function Screen({
  session,
  process,
  onFollowed,
}: {
  session: string;
  process: string;
  onFollowed: (f: Followed) => void;
}) {
  const host = useRef<HTMLDivElement>(null);
  const shell = useRef<Shell | null>(null);
  const latest = useRef(onFollowed);
  latest.current = onFollowed;
  const colors = theme.value;
  useEffect(() => {
    let gone = false;
    void import('./xterm.ts').then((module) => {
      if (gone || !host.current) return;
      shell.current = new module.Shell(host.current, session, process, (followed) => latest.current(followed));
    });
    return () => {
      gone = true;
      shell.current?.dispose();
    };
  }, []);
  useEffect(() => shell.current?.recolor(), [colors]);
  return <div class="terminal-host" ref={host} data-keys="own" />;
}

export function TerminalTab({ session, reload, rest }: TabProps) {
  const wanted = rest[0] ?? '';
  // What is open: a serial number, so that a new shell is a new screen; and the process it goes back to.
  const open = useSignal<{ serial: number; process: string } | null>(wanted ? { serial: 0, process: wanted } : null);
  const followed = useSignal<Followed | null>(null);
  const list = useLoad(
    (signal) => call<{ processes: Process[] }>(at(session.id, 'processes'), { signal }),
    [session.id],
  );
  useInterval(() => void list.refresh(), REFRESH_MS);
  const shells = (list.value?.processes ?? []).filter((each) => each.pty && each.status === 'running');
  const current = followed.value?.process ?? open.value?.process ?? '';
  const start = (process: string) => {
    followed.value = null;
    open.value = { serial: Date.now(), process };
  };
  const end = async () => {
    try {
      await call(at(session.id, 'processes', current), { method: 'DELETE' });
      await Promise.all([list.reload(), reload()]);
    } catch (error) {
      sayError(error);
    }
  };
  const state = followed.value?.state;
  return (
    <div class="pane alone">
      <div class="pane-head wrap">
        <Button kind={open.value ? undefined : 'primary'} icon="plus" onClick={() => start('')}>
          New shell
        </Button>
        {shells.length > 0 && (
          <Select
            label="Running terminals"
            hidden
            value={shells.some((each) => each.process_id === current) ? current : ''}
            options={[
              ['', `${shells.length} running`],
              ...shells.map((each): [string, string] => [
                each.process_id,
                `${titleOfCommand(each)}, ${ago(each.started_at)}`,
              ]),
            ]}
            onChange={(process) => process && start(process)}
          />
        )}
        <span class="soft" role="status">
          {state === 'open'
            ? ''
            : state === 'connecting' || (open.value && !state)
              ? 'connecting…'
              : followed.value?.text}
        </span>
        <span class="push" />
        {state === 'open' && (
          <Button kind="quiet" icon="stop" onClick={() => void end()}>
            End it
          </Button>
        )}
      </div>
      <Problem error={list.error} />
      {open.value ? (
        <Screen
          key={open.value.serial}
          session={session.id}
          process={open.value.process}
          onFollowed={(now) => {
            const before = followed.value;
            followed.value = now;
            // The place names the shell, so that it is found again.
            if (now.process && now.process !== before?.process) go('sessions', session.id, 'terminal', now.process);
            if (now.state !== before?.state) void Promise.all([list.reload(), reload()]);
          }}
        />
      ) : (
        <div class="pane-empty">
          <Icon name="terminal" size={24} />
          <p>A shell works on the session’s files, beside its runs. It goes on when you leave this page.</p>
        </div>
      )}
    </div>
  );
}
