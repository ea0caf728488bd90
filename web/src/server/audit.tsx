/** The audit log: who did what. */

import { useSignal } from '@preact/signals';
import { call } from '../api.ts';
import { useLoad } from '../hooks.ts';
import { href } from '../router.ts';
import type { AuditEntry, Page } from '../types.ts';
import { Ago, Button, Empty, Name, Select } from '../ui/basics.tsx';
import { sayError } from '../ui/dialog.tsx';
import { Listing, Table } from '../ui/listing.tsx';

const ACTIONS: [value: string, text: string][] = [
  ['', 'all'],
  ['session.create', 'sessions created'],
  ['session.delete', 'sessions deleted'],
  ['session.restore', 'sessions restored'],
  ['session.public', 'public access set'],
  ['key.create', 'keys made'],
  ['key.change', 'keys changed'],
  ['key.rotate', 'keys rotated'],
  ['key.revoke', 'keys revoked'],
  ['quotas.change', 'quotas set'],
  ['webhook.create', 'webhooks made'],
  ['webhook.delete', 'webhooks deleted'],
  ['secret.use', 'secrets used'],
  ['link.create', 'links made'],
];

function plain(value: unknown): string {
  if (Array.isArray(value)) return value.map(plain).join(', ');
  return typeof value === 'object' && value !== null ? JSON.stringify(value) : String(value);
}

/** What an entry says besides, in a line of text. */
function details(entry: AuditEntry): string {
  const { secrets, count, ...rest } = entry.details as {
    secrets?: { [name: string]: string[] };
    count?: number;
  };
  const named = Object.entries(secrets ?? {}).map(([name, hosts]) => `${name} for ${hosts.join(', ')}`);
  const more = (count ?? 0) - named.length;
  return [
    ...named,
    ...(more > 0 ? [`${more} more`] : []),
    ...Object.entries(rest).map(([name, value]) => `${name.replaceAll('_', ' ')}: ${plain(value)}`),
  ].join('; ');
}

export function AuditPage() {
  const action = useSignal('');
  const older = useSignal<{ entries: AuditEntry[]; cursor: string | null } | null>(null);
  const loaded = useLoad(
    (signal) => {
      older.value = null;
      return call<Page & { entries: AuditEntry[] }>('/api/audit', { query: { action: action.value || null }, signal });
    },
    [action.value],
  );
  const entries = [...(loaded.value?.entries ?? []), ...(older.value?.entries ?? [])];
  const cursor = older.value ? older.value.cursor : (loaded.value?.next_cursor ?? null);

  const more = async () => {
    const query = { action: action.value || null, cursor };
    try {
      const page = await call<Page & { entries: AuditEntry[] }>('/api/audit', { query });
      older.value = { entries: [...(older.value?.entries ?? []), ...page.entries], cursor: page.next_cursor };
    } catch (error) {
      sayError(error);
    }
  };

  return (
    <section class="page">
      <header class="page-head">
        <h1>Audit</h1>
        <Select
          label="Show"
          hidden
          value={action.value}
          options={ACTIONS}
          onChange={(value) => {
            action.value = value;
          }}
        />
      </header>
      <p class="soft lead">Who did what: an owner sees what was done with the owner’s keys, the operator all.</p>
      <Listing
        of={loaded}
        items={() => entries}
        empty={
          <Empty icon="audit" title="Nothing yet">
            <p class="soft">What is created, deleted or opened to others will be listed here.</p>
          </Empty>
        }
      >
        {() => (
          <Table columns={['When', 'Owner', 'Key', 'Action', 'To', 'Details']}>
            {entries.map((entry) => (
              <tr key={entry.id}>
                <td class="soft">
                  <Ago time={entry.at} />
                </td>
                <td>
                  <Name>{entry.owner}</Name>
                </td>
                <td class="mono soft">{entry.key ?? '–'}</td>
                <td>{entry.action}</td>
                <td>
                  {entry.target && entry.action.startsWith('session.') ? (
                    <a href={href('sessions', entry.target)}>
                      <Name>{entry.target}</Name>
                    </a>
                  ) : (
                    <Name>{entry.target ?? '–'}</Name>
                  )}
                </td>
                <td class="soft wide">
                  <Name>{details(entry)}</Name>
                </td>
              </tr>
            ))}
          </Table>
        )}
      </Listing>
      {cursor && <Button onClick={() => void more()}>Older entries</Button>}
    </section>
  );
}
