/** The hosts of a cluster: how each is, and how many sessions are at home there. */

import { call } from '../api.ts';
import { useInterval, useLoad } from '../hooks.ts';
import type { Hosts } from '../types.ts';
import { Ago, Problem, Status } from '../ui/basics.tsx';
import { Table } from '../ui/listing.tsx';
import { isOthers } from './limits.tsx';

const REFRESH_MS = 10_000;
const COLUMNS = [
  'Host',
  'Status',
  { number: 'Sessions' },
  { number: 'Sandboxes' },
  { number: 'Processes' },
  { number: 'Moved away' },
  'Heartbeat',
];

/** The list of hosts. Outside of a cluster, and for others than the operator, there is nothing to show. */
export function HostsOfCluster() {
  const loaded = useLoad((signal) => call<Hosts>('/api/hosts', { signal }), []);
  useInterval(() => void loaded.refresh(), REFRESH_MS);
  const hosts = loaded.value?.hosts ?? [];
  if (isOthers(loaded.error) || (!hosts.length && !loaded.error)) return null;
  return (
    <section class="hosts">
      <h2>Hosts</h2>
      <Problem error={loaded.error} retry={() => void loaded.reload()} />
      {hosts.length > 0 && (
        <Table columns={COLUMNS} label="Hosts">
          {hosts.map((host) => (
            <tr key={host.id}>
              <td>
                <b>{host.url || 'not listening'}</b>
                <div class="mono soft">{host.id}</div>
                <div class="soft">
                  {host.state && `ERA ${host.state.version}`}
                  {host.id === loaded.value?.this && ', which shows this page'}
                </div>
              </td>
              <td>
                <Status>{host.status}</Status>
                {host.leader && <div class="soft">leader</div>}
                {host.state?.reason && <div class="problem-text">{host.state.reason}</div>}
              </td>
              <td class="number">{host.sessions.toLocaleString('en')}</td>
              <td class="number">{host.state?.sandboxes.live ?? '–'}</td>
              <td class="number">{host.state?.processes ?? '–'}</td>
              <td class="number">{host.state?.moved_away.toLocaleString('en') ?? '–'}</td>
              <td class="soft">
                <Ago time={host.heartbeat_at} />
              </td>
            </tr>
          ))}
        </Table>
      )}
    </section>
  );
}
