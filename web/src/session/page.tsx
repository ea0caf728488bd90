/** One session: its head, its tabs, and the tab that is open. */

import { useEffect, useRef } from 'preact/hooks';
import { at, call } from '../api.ts';
import { useCommands } from '../commands.ts';
import { useInterval, useLoad } from '../hooks.ts';
import { titleOf } from '../languages.ts';
import { NotebookTab } from '../live/notebook.tsx';
import { ProcessesTab } from '../live/processes.tsx';
import { TerminalTab } from '../live/terminal.tsx';
import { go, href } from '../router.ts';
import type { Session } from '../types.ts';
import { Boundary, Copy, Empty, Name, Problem, Status, Waiting } from '../ui/basics.tsx';
import { Icon } from '../ui/icons.tsx';
import { DataTab } from './data.tsx';
import { FilesTab } from './files.tsx';
import { InboxTab } from './inbox.tsx';
import { PublicTab } from './public.tsx';
import { RunTab } from './run.tsx';
import { RunsTab } from './runs.tsx';
import { SettingsTab } from './settings.tsx';
import { SetupTab } from './setup.tsx';
import { VersionsTab } from './versions.tsx';

export interface TabProps {
  session: Session;
  /** Load the session again, after a change. */
  reload: () => Promise<void>;
  set: (session: Session) => void;
  rest: string[];
}

const REFRESH_MS = 3000;

const TABS: [name: string, title: string, icon: string, tab: (props: TabProps) => preact.JSX.Element][] = [
  ['run', 'Code', 'play', RunTab],
  ['data', 'Data', 'data', DataTab],
  ['files', 'Files', 'folder', FilesTab],
  ['versions', 'Versions', 'history', VersionsTab],
  ['runs', 'Runs', 'sessions', RunsTab],
  ['notebook', 'Notebook', 'notebook', NotebookTab],
  ['processes', 'Processes', 'process', ProcessesTab],
  ['terminal', 'Terminal', 'terminal', TerminalTab],
  ['setup', 'Setup', 'package', SetupTab],
  ['inbox', 'Inbox', 'inbox', InboxTab],
  ['public', 'Public URL', 'globe', PublicTab],
  ['settings', 'Settings', 'settings', SettingsTab],
];

export function SessionPage({ id, tab, rest }: { id: string; tab: string; rest: string[] }) {
  const loaded = useLoad((signal) => call<Session>(at(id), { signal }), [id]);
  const session = loaded.value;
  useInterval(() => void loaded.refresh(), session ? REFRESH_MS : null);
  useCommands(
    TABS.map(([name, title], index) => ({
      title: `${title} of this session`,
      ...(index < 9 ? { keys: String(index + 1) } : {}),
      group: 'Session',
      run: () => go('sessions', id, name),
    })),
    [id],
  );
  const current = useRef<HTMLAnchorElement>(null);
  // On a phone there are more of them than fit.
  useEffect(() => current.current?.scrollIntoView({ block: 'nearest', inline: 'center' }), [tab, Boolean(session)]);
  const Tab = TABS.find(([name]) => name === tab)?.[3] ?? RunTab;

  if (!session && loaded.error)
    return (
      <section class="page">
        <header class="page-head">
          <h1>
            <Name>{id}</Name>
          </h1>
        </header>
        <Problem error={loaded.error} retry={() => void loaded.reload()} />
        <Empty icon="sessions" title="This session can’t be shown">
          <a class="button" href={href('sessions')}>
            All sessions
          </a>
        </Empty>
      </section>
    );
  return (
    <section class="page full session">
      <header class="page-head">
        <a class="crumb" href={href('sessions')} aria-label="All sessions">
          <Icon name="sessions" size={18} />
        </a>
        <h1>
          <Name>{id}</Name>
        </h1>
        <Copy text={id} label="Copy the id" />
        {session && (
          <p class="session-facts">
            <Status>{session.status}</Status>
            <span>{titleOf(session.language)}</span>
            <span title="The version in force">v{session.version}</span>
          </p>
        )}
      </header>
      <Problem error={loaded.error} retry={() => void loaded.reload()} />
      <nav class="tabs" aria-label="Parts of the session">
        {TABS.map(([name, title, icon]) => (
          <a
            key={name}
            ref={name === tab ? current : undefined}
            href={href('sessions', id, name)}
            aria-current={name === tab ? 'page' : undefined}
          >
            <Icon name={icon} />
            {title}
          </a>
        ))}
      </nav>
      <div class="tab-body">
        {session ? (
          <Boundary key={tab}>
            <Tab session={session} reload={loaded.reload} set={loaded.set} rest={rest} />
          </Boundary>
        ) : (
          <Waiting lines={6} />
        )}
      </div>
    </section>
  );
}
