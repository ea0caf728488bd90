/** The page of all sessions: search, filters, and a way to a new one. */

import { useSignal } from '@preact/signals';
import { useEffect, useMemo, useRef } from 'preact/hooks';
import { at, call, returns } from '../api.ts';
import { useCommands } from '../commands.ts';
import { bytes, count } from '../format.ts';
import { useInterval } from '../hooks.ts';
import { languages, titleOf } from '../languages.ts';
import { go } from '../router.ts';
import {
  type Filters,
  isFound,
  type ListedSession,
  listed,
  loadSessions,
  NO_FILTERS,
  refreshSessions,
  splitLabel,
} from '../sessions.ts';
import { Ago, Button, Empty, Name, Problem, Select, Status, Waiting } from '../ui/basics.tsx';
import { confirm, say } from '../ui/dialog.tsx';
import { Icon } from '../ui/icons.tsx';
import { Rows } from '../ui/rows.tsx';

const ROW = 60;
const REFRESH_MS = 4000;

function Row({ session }: { session: ListedSession }) {
  const labels = Object.entries(session.metadata).slice(0, 3);
  return (
    <div class="session-row">
      <span class="session-name">
        <Name>{session.id}</Name>
        <span class="labels">
          {labels.map(([name, value]) => (
            <span class="label" key={name}>
              <Name>{`${name}=${typeof value === 'string' ? value : JSON.stringify(value)}`}</Name>
            </span>
          ))}
        </span>
      </span>
      <span class="cell language">{titleOf(session.language)}</span>
      <span class="cell status-cell">
        <Status>{session.status}</Status>
      </span>
      <span class="cell number">v{session.version}</span>
      <span class="cell number files-cell">
        {session.file_count ? `${count(session.file_count, 'file')}, ${bytes(session.total_size_bytes)}` : 'no files'}
      </span>
      <span class="cell number when">
        <Ago time={session.last_run_at || session.created_at} />
      </span>
    </div>
  );
}

const isGone = ({ status }: ListedSession) => status === 'deleted' || status === 'expired';

function restore(session: ListedSession, filters: Filters): void {
  confirm({
    title: `Restore ${session.id}`,
    text: (
      <p>
        It {session.status === 'deleted' ? 'was deleted' : 'has expired'}. Restored, it is as it was: data, files,
        versions and records.
      </p>
    ),
    verb: 'Restore',
    act: async () => {
      await call(at(session.id, 'restore'), { method: 'POST' });
      say(`${session.id} is back.`);
      void loadSessions(filters);
      go('sessions', session.id);
    },
  });
}

export function SessionsPage() {
  const search = useSignal('');
  const filters = useSignal<Filters>(NO_FILTERS);
  const label = useSignal('');
  const box = useRef<HTMLInputElement>(null);
  const { sessions, complete, loading, error } = listed.value;
  const epoch = returns.value;

  const set = (changed: Partial<Filters>) => {
    filters.value = { ...filters.value, ...changed };
  };
  useEffect(() => {
    void loadSessions(filters.value);
  }, [filters.value, epoch]);
  useInterval(() => void refreshSessions(filters.value).catch(() => undefined), REFRESH_MS);
  useCommands([{ title: 'Search sessions', keys: '/', group: 'Page', run: () => box.current?.focus() }], []);
  const found = useMemo(() => sessions.filter((session) => isFound(session, search.value)), [sessions, search.value]);
  const filtered = Object.values(filters.value).some(Boolean) || search.value !== '';

  return (
    <section class="page full">
      <header class="page-head">
        <h1>Sessions</h1>
        <p class="soft" role="status">
          {error ? '' : `${found.length.toLocaleString('en')}${complete ? '' : ' so far'}`}
        </p>
        <Button kind="primary" icon="plus" onClick={() => go('new')}>
          New session
        </Button>
      </header>
      <div class="filters">
        <div class="search">
          <Icon name="search" />
          <input
            ref={box}
            type="search"
            aria-label="Search sessions"
            placeholder="Search by id or label"
            value={search.value}
            onInput={(event) => {
              search.value = event.currentTarget.value;
            }}
          />
          <kbd>/</kbd>
        </div>
        <Select
          label="Language"
          hidden
          value={filters.value.language}
          options={[['', 'Any language'], ...languages.value.map((each): [string, string] => [each.name, each.title])]}
          onChange={(language) => set({ language })}
        />
        <Select
          label="Status"
          hidden
          value={filters.value.status}
          options={[
            ['', 'Any status'],
            ['idle', 'Idle'],
            ['running', 'Running'],
            ['expired', 'Expired'],
            ['deleted', 'Deleted'],
          ]}
          onChange={(status) => set({ status })}
        />
        <input
          class="label-filter"
          type="text"
          aria-label="Filter by label, as name=value"
          placeholder="label=value"
          autocomplete="off"
          spellcheck={false}
          value={label.value}
          onInput={(event) => {
            label.value = event.currentTarget.value;
          }}
          onChange={() => {
            const [name] = splitLabel(label.value);
            if (name || !label.value) set({ label: label.value });
          }}
        />
      </div>
      <Problem error={error} retry={() => void loadSessions(filters.value)} />
      {loading && !sessions.length && !error ? (
        <Waiting lines={8} />
      ) : found.length ? (
        <Rows
          items={found}
          height={ROW}
          label="Sessions"
          keyOf={(session) => session.id}
          row={(session) => <Row session={session} />}
          onOpen={(session) => (isGone(session) ? restore(session, filters.value) : go('sessions', session.id))}
        />
      ) : (
        !error &&
        !loading &&
        (filtered ? (
          <Empty icon="search" title="No session matches">
            <p class="soft">The search looks at ids, languages and labels.</p>
            <Button
              onClick={() => {
                search.value = '';
                label.value = '';
                filters.value = NO_FILTERS;
              }}
            >
              Clear search and filters
            </Button>
          </Empty>
        ) : (
          <Empty icon="sessions" title="No sessions yet">
            <p class="soft">
              A session is a JSON state, a tree of files, a language and some settings. What code leaves in it is there
              for the next run.
            </p>
            <Button kind="primary" icon="plus" onClick={() => go('new')}>
              New session
            </Button>
          </Empty>
        ))
      )}
    </section>
  );
}
