/** Quotas and what fills them, usage by day; for the operator, those of all owners. */

import { useSignal } from '@preact/signals';
import { ApiError, call } from '../api.ts';
import { bytes } from '../format.ts';
import { useAction, useInterval, useLoad } from '../hooks.ts';
import { href } from '../router.ts';
import type { Owner, Quotas, Session, UsageDay } from '../types.ts';
import { Button, Form, Name, Problem, TextField, Waiting } from '../ui/basics.tsx';
import { Dialog, say } from '../ui/dialog.tsx';
import { Listing, Table } from '../ui/listing.tsx';
import { Plot } from './plot.tsx';

const QUOTAS: [name: keyof Quotas, title: string, unit: string][] = [
  ['sessions', 'Sessions', ''],
  ['sandboxes', 'Sandboxes at a time', ''],
  ['memory_mb', 'Memory of sandboxes', 'MiB'],
  ['disk_mb', 'Files of sessions', 'MiB'],
  ['storage_mb', 'Storage of programs', 'MiB'],
  ['runs_per_minute', 'Runs a minute', ''],
  ['cpu_seconds_per_day', 'Processor time a day', 's'],
  ['egress_mb_per_day', 'Network a day', 'MiB'],
];
const AMOUNTS = ['Runs', 'Processors', 'Network', 'Files', 'Storage'];
const REFRESH_MS = 5000;
const LARGEST = 5;
const LOOKED_AT = 1000;

function amount(value: number, unit: string): string {
  const text = value.toLocaleString('en', { maximumFractionDigits: value < 10 ? 2 : 0 });
  return unit ? `${text} ${unit}` : text;
}

const withUnit = (title: string, unit: string) => (unit ? `${title} (${unit})` : title);

/** How full each quota is; what has no bound has no bar. */
function Meters({ owner }: { owner: Owner }) {
  return (
    <ul class="meters">
      {QUOTAS.map(([name, title, unit]) => {
        const limit = owner.quotas[name];
        const used = owner.used[name];
        return (
          <li key={name}>
            <span>{title}</span>
            <span class="number soft">
              {amount(used, unit)} {limit ? `of ${amount(limit, unit)}` : '· no limit'}
            </span>
            {limit > 0 && (
              <meter
                min={0}
                max={limit}
                value={Math.min(used, limit)}
                low={limit * 0.8}
                high={limit * 0.95}
                optimum={0}
                aria-label={title}
              />
            )}
          </li>
        );
      })}
    </ul>
  );
}

type Listed = Pick<Session, 'id' | 'total_size_bytes'>;

/** What one would look at first where a quota is full. */
function WhatFills() {
  const loaded = useLoad(
    (signal) =>
      call<{ sessions: Listed[]; next_cursor: string | null }>('/api/sessions', {
        query: { limit: LOOKED_AT, fields: 'id,total_size_bytes' },
        signal,
      }),
    [],
  );
  const sessions = [...(loaded.value?.sessions ?? [])]
    .filter((each) => each.total_size_bytes > 0)
    .sort((one, other) => other.total_size_bytes - one.total_size_bytes)
    .slice(0, LARGEST);
  return (
    <>
      <h2>What fills them</h2>
      <Problem error={loaded.error} />
      {loaded.value && (
        <>
          <p class="soft">
            {sessions.length ? 'Sessions with the largest files' : 'No session has files'}
            {loaded.value.next_cursor ? `, of the newest ${LOOKED_AT.toLocaleString('en')}` : ''}. Values, tables and
            objects are in the <a href={href('storage')}>storage</a>.
          </p>
          <ol class="timeline" aria-label="Largest sessions">
            {sessions.map((each) => (
              <li key={each.id}>
                <a href={href('sessions', each.id, 'files')}>
                  <span class="one-line">
                    <Name>{each.id}</Name>
                  </span>
                  <span class="push" />
                  <span class="soft number">{bytes(each.total_size_bytes)}</span>
                </a>
              </li>
            ))}
          </ol>
        </>
      )}
    </>
  );
}

/** One value a day, of all owners together, the oldest first; a day on which nothing was used has 0. */
function byDay(days: UsageDay[], value: (day: UsageDay) => number): { times: number[]; values: number[] } {
  const sums = new Map<number, number>();
  for (const day of days) {
    const at = Date.parse(day.day) / 1000;
    sums.set(at, (sums.get(at) ?? 0) + value(day));
  }
  const known = [...sums.keys()].sort((one, other) => one - other);
  const times: number[] = [];
  const last = known.at(-1) ?? 0;
  for (let at = Math.min(known[0] ?? 0, last - 6 * 86_400); at <= last; at += 86_400) times.push(at);
  return { times, values: times.map((at) => sums.get(at) ?? 0) };
}

function Usage() {
  const loaded = useLoad((signal) => call<{ usage: UsageDay[] }>('/api/usage', { signal }), []);
  const days = loaded.value?.usage ?? [];
  const several = new Set(days.map((day) => day.owner)).size > 1;
  const plots: [title: string, color: string, value: (day: UsageDay) => number][] = [
    ['Runs a day', '--plot-1', (day) => day.runs],
    ['Seconds of processors a day', '--plot-2', (day) => day.cpu_seconds],
    ['MiB by the network a day', '--plot-3', (day) => day.egress_bytes / 2 ** 20],
  ];
  return (
    <section>
      <h2>The last 30 days</h2>
      <Listing of={loaded} items={() => days} empty={<p class="soft">Nothing was used yet.</p>}>
        {() => (
          <>
            <div class="plots">
              {plots.map(([title, color, value]) => {
                const { times, values } = byDay(days, value);
                return (
                  <Plot
                    key={title}
                    title={title}
                    clock="{D}.{M}."
                    times={times}
                    series={[{ label: 'the last day', values, color }]}
                  />
                );
              })}
            </div>
            <Table columns={['Day', ...(several ? ['Owner'] : []), ...AMOUNTS.map((number) => ({ number }))]}>
              {days.map((day) => (
                <tr key={`${day.day} ${day.owner}`}>
                  <td>{day.day}</td>
                  {several && (
                    <td>
                      <Name>{day.owner}</Name>
                    </td>
                  )}
                  <td class="number">{day.runs.toLocaleString('en')}</td>
                  <td class="number">{amount(day.cpu_seconds, 's')}</td>
                  <td class="number">{bytes(day.egress_bytes)}</td>
                  <td class="number">{day.disk_bytes === null ? '–' : bytes(day.disk_bytes)}</td>
                  <td class="number">{day.storage_bytes === null ? '–' : bytes(day.storage_bytes)}</td>
                </tr>
              ))}
            </Table>
          </>
        )}
      </Listing>
    </section>
  );
}

function SetQuotas({ owner, onClose, onSet }: { owner: Owner; onClose: () => void; onSet: () => void }) {
  const typed = useSignal<{ [name: string]: string }>(
    Object.fromEntries(QUOTAS.map(([name]) => [name, owner.set[name]?.toString() ?? ''])),
  );
  const save = useAction(async () => {
    const given = Object.entries(typed.value).map(([name, text]) => [name, text.trim() ? Number(text) : null]);
    await call(`/api/owners/${encodeURIComponent(owner.owner)}`, {
      method: 'PATCH',
      json: { quotas: Object.fromEntries(given) },
    });
    say('The quotas are set.');
    onSet();
    onClose();
  });
  return (
    <Dialog title={`Quotas of ${owner.owner}`} onClose={onClose}>
      <Form onSubmit={() => void save.run()}>
        <p class="soft">0 means no limit. A field that is left empty follows the server’s settings.</p>
        {QUOTAS.map(([name, title, unit]) => (
          <TextField
            key={name}
            label={withUnit(title, unit)}
            type="number"
            min={0}
            placeholder={String(owner.quotas[name])}
            value={typed.value[name] ?? ''}
            onText={(text) => {
              typed.value = { ...typed.value, [name]: text };
            }}
          />
        ))}
        <Problem error={save.error} />
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" type="submit" busy={save.busy}>
            Set
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

/** All owners, for the operator; nobody else sees anything of it. */
function Owners() {
  const changing = useSignal<Owner | null>(null);
  const loaded = useLoad((signal) => call<{ owners: Owner[] }>('/api/owners', { signal }), []);
  if (loaded.error instanceof ApiError && loaded.error.status === 403) return null;
  const of = (owner: Owner, name: keyof Quotas) =>
    `${amount(owner.used[name], '')}${owner.quotas[name] ? ` of ${amount(owner.quotas[name], '')}` : ''}`;
  return (
    <section>
      <h2>Owners</h2>
      <Listing of={loaded} items={(value) => value.owners}>
        {(owners) => (
          <Table
            columns={[
              'Owner',
              ...QUOTAS.map(([, title, unit]) => ({ number: withUnit(title, unit) })),
              { actions: 'Actions' },
            ]}
          >
            {owners.map((owner) => (
              <tr key={owner.owner}>
                <td>
                  <b>
                    <Name>{owner.owner}</Name>
                  </b>
                </td>
                {QUOTAS.map(([name]) => (
                  <td key={name} class="number">
                    {of(owner, name)}
                  </td>
                ))}
                <td class="actions">
                  <Button
                    kind="quiet"
                    icon="edit"
                    aria-label={`Set quotas of ${owner.owner}`}
                    title="Set quotas"
                    onClick={() => {
                      changing.value = owner;
                    }}
                  />
                </td>
              </tr>
            ))}
          </Table>
        )}
      </Listing>
      {changing.value && (
        <SetQuotas
          owner={changing.value}
          onSet={() => void loaded.reload()}
          onClose={() => {
            changing.value = null;
          }}
        />
      )}
    </section>
  );
}

export function UsagePage() {
  const loaded = useLoad((signal) => call<Owner>('/api/quotas', { signal }), []);
  useInterval(() => void loaded.refresh(), REFRESH_MS);
  return (
    <section class="page">
      <header class="page-head">
        <h1>Usage</h1>
      </header>
      <p class="soft lead">
        What you use, and what your quotas allow. A call beyond a quota is refused, with an error that names it.
      </p>
      <Problem error={loaded.error} retry={() => void loaded.reload()} />
      {!loaded.value && !loaded.error && <Waiting />}
      {loaded.value && (
        <div class="columns">
          <section>
            <h2>
              Quotas of <Name>{loaded.value.owner}</Name>
            </h2>
            <Meters owner={loaded.value} />
          </section>
          <section>
            <WhatFills />
          </section>
        </div>
      )}
      <Usage />
      <Owners />
    </section>
  );
}
