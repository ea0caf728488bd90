/** The storage of programs: values (kv), SQL databases (d1), objects (r2). */

import { useSignal } from '@preact/signals';
import { useEffect } from 'preact/hooks';
import { call } from '../api.ts';
import { bytes, count, plain } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { go, href } from '../router.ts';
import type { Json, Resource } from '../types.ts';
import { Ago, Button, Empty, Facts, Form, Name, Problem, Select, TextArea, TextField, Waiting } from '../ui/basics.tsx';
import { confirm, say, sayError } from '../ui/dialog.tsx';
import { Table } from '../ui/listing.tsx';
import { Printed } from '../ui/output.tsx';
import { Tree } from '../ui/tree.tsx';

const KINDS: { [type: string]: string } = { kv: 'Value', d1: 'Table', r2: 'Object' };
const PAGE = 200;
const MOST_AT_ONCE = 1000;

interface Stats {
  total: number;
  by_type: { [type: string]: number };
  by_namespace: { [namespace: string]: number };
  total_size: number;
}

function pathOf(type: string, namespace: string, key: string): string {
  return `/api/storage/${type}/${encodeURIComponent(namespace)}/${encodeURIComponent(key)}`;
}

function bytesOf(base64: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
}

function Value({ resource, gone }: { resource: Resource; gone: () => void }) {
  const path = pathOf(resource.type, resource.namespace, resource.key);
  const loaded = useLoad(
    (signal) =>
      call<{ value?: Json; content?: string; size?: number; customMetadata?: Json; metadata?: Json }>(path, { signal }),
    [path],
  );
  const value = loaded.value;
  const content = value?.content === undefined ? null : bytesOf(value.content);
  const save = () => {
    if (!content) return;
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([content]));
    link.download = resource.key.split('/').pop() ?? 'object';
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  return (
    <>
      <header class="section-head wrap">
        <h2>
          <Name>{resource.key}</Name>
        </h2>
        <span class="push" />
        {content && (
          <Button icon="down" onClick={save}>
            Download
          </Button>
        )}
        <Button
          kind="quiet"
          icon="trash"
          aria-label="Delete"
          title="Delete"
          onClick={() =>
            confirm({
              title: 'Delete it',
              text: (
                <p>
                  <Name>{resource.key}</Name> can’t be brought back.
                </p>
              ),
              verb: 'Delete',
              danger: true,
              act: async () => {
                await call(path, { method: 'DELETE' });
                say(`${plain(resource.key)} was deleted.`);
                gone();
              },
            })
          }
        />
      </header>
      <Facts
        facts={[
          ['Namespace', <Name key="n">{resource.namespace}</Name>],
          ['Size', bytes(resource.size)],
          ['Changed', <Ago key="t" time={resource.updated_at ?? ''} />],
        ]}
      />
      <Problem error={loaded.error} />
      {!value && !loaded.error && <Waiting lines={2} />}
      {value &&
        content === null &&
        (typeof value.value === 'string' ? (
          <Printed text={value.value} label="Value" />
        ) : (
          <Tree value={value.value ?? null} />
        ))}
      {content && content.length < 200_000 && <Printed text={new TextDecoder().decode(content)} label="Content" />}
      {resource.metadata && Object.keys(resource.metadata).length > 0 && (
        <>
          <h3>Metadata</h3>
          <Tree value={resource.metadata} />
        </>
      )}
    </>
  );
}

function Database({ namespace, table }: { namespace: string; table: string }) {
  const sql = useSignal(`SELECT * FROM "${table.replaceAll('"', '""')}" LIMIT 100`);
  const rows = useSignal<{ [column: string]: Json }[] | null>(null);
  const query = useAction(async () => {
    const answer = await call<{ results: { [column: string]: Json }[] }>(
      `/api/storage/d1/${encodeURIComponent(namespace)}/query`,
      { json: { sql: sql.value } },
    );
    rows.value = answer.results;
  });
  // The first statement only reads.
  useEffect(() => void query.run(), []);
  const columns = Object.keys(rows.value?.[0] ?? {});
  return (
    <>
      <header class="section-head">
        <h2>
          <Name>{`${namespace}: ${table}`}</Name>
        </h2>
      </header>
      <Form onSubmit={() => void query.run()}>
        <TextArea
          label="SQL"
          hint="One statement. It may also change the database."
          rows={3}
          value={sql.value}
          onText={(text) => {
            sql.value = text;
          }}
        />
        <footer class="form-foot">
          <Button kind="primary" icon="play" type="submit" busy={query.busy}>
            Run
          </Button>
        </footer>
      </Form>
      <Problem error={query.error} />
      {rows.value &&
        (columns.length ? (
          <Table label="Rows" columns={columns.map((name) => ({ name }))}>
            {rows.value.slice(0, 1000).map((row, at) => (
              <tr key={String(at)}>
                {columns.map((column) => (
                  <td key={column} class={typeof row[column] === 'number' ? 'number' : ''}>
                    <Name>
                      {String(typeof row[column] === 'object' ? JSON.stringify(row[column]) : row[column]).slice(
                        0,
                        300,
                      )}
                    </Name>
                  </td>
                ))}
              </tr>
            ))}
          </Table>
        ) : (
          <p class="soft">No rows.</p>
        ))}
    </>
  );
}

export function StoragePage({ rest }: { rest: string[] }) {
  const type = useSignal('');
  const namespace = useSignal('');
  const prefix = useSignal('');
  const shown = useSignal(PAGE);
  const stats = useLoad((signal) => call<Stats>('/api/resources/stats', { signal }), []);
  const list = useLoad(
    async (signal) => {
      const query = { type: type.value, namespace: namespace.value, key_prefix: prefix.value };
      const resources: Resource[] = [];
      let has_more = true;
      while (has_more && resources.length < shown.value) {
        const limit = Math.min(MOST_AT_ONCE, shown.value - resources.length);
        const page = await call<{ resources: Resource[]; has_more: boolean }>('/api/resources/list', {
          signal,
          query: { ...query, limit, offset: resources.length },
        });
        resources.push(...page.resources);
        has_more = page.has_more && page.resources.length > 0;
      }
      return { resources, has_more };
    },
    [type.value, namespace.value, prefix.value, shown.value],
  );
  const reload = () => void Promise.all([stats.reload(), list.reload()]).catch(sayError);
  const resources = list.value?.resources ?? [];
  const [kind, space, ...key] = rest;
  const chosen = resources.find((each) => each.type === kind && each.namespace === space && each.key === key.join('/'));
  const empty = stats.value?.total === 0;
  return (
    <section class="page full">
      <header class="page-head">
        <h1>Storage</h1>
        {stats.value && (
          <p class="soft">
            {count(stats.value.total, 'thing')}, {bytes(stats.value.total_size)}
          </p>
        )}
        <Button kind="quiet" icon="refresh" aria-label="Load again" title="Load again" onClick={reload} />
      </header>
      <Problem error={stats.error ?? list.error} retry={reload} />
      {empty ? (
        <Empty icon="storage" title="Nothing is stored">
          <p class="soft">
            Programs keep values, SQL tables and objects here, beyond their session: <code>import era_storage</code>.
          </p>
        </Empty>
      ) : (
        <div class="columns timeline-columns">
          <section>
            <div class="filters">
              <Select
                label="Kind"
                hidden
                value={type.value}
                options={[
                  ['', 'All kinds'],
                  ['kv', 'Values'],
                  ['d1', 'Tables'],
                  ['r2', 'Objects'],
                ]}
                onChange={(value) => {
                  type.value = value;
                }}
              />
              <Select
                label="Namespace"
                hidden
                value={namespace.value}
                options={[
                  ['', 'All namespaces'],
                  ...Object.keys(stats.value?.by_namespace ?? {}).map((name): [string, string] => [name, plain(name)]),
                ]}
                onChange={(value) => {
                  namespace.value = value;
                }}
              />
            </div>
            <TextField
              label="Begins with"
              value={prefix.value}
              onText={(text) => {
                prefix.value = text;
              }}
            />
            {!list.value && !list.error && <Waiting />}
            <ol class="timeline" aria-label="Stored">
              {resources.map((each) => (
                <li key={`${each.type}/${each.namespace}/${each.key}`}>
                  <a
                    href={href('storage', each.type, each.namespace, each.key)}
                    aria-current={each === chosen ? 'true' : undefined}
                  >
                    <span class="label">{KINDS[each.type] ?? each.type}</span>
                    <Name>{each.key}</Name>
                    <span class="push" />
                    <span class="soft">
                      <Name>{each.namespace}</Name>
                    </span>
                  </a>
                </li>
              ))}
            </ol>
            {list.value?.has_more && (
              <Button
                onClick={() => {
                  shown.value += PAGE;
                }}
              >
                More
              </Button>
            )}
          </section>
          <section>
            {chosen ? (
              chosen.type === 'd1' ? (
                <Database key={`${chosen.namespace}/${chosen.key}`} namespace={chosen.namespace} table={chosen.key} />
              ) : (
                <Value
                  key={`${chosen.type}/${chosen.namespace}/${chosen.key}`}
                  resource={chosen}
                  gone={() => {
                    go('storage');
                    reload();
                  }}
                />
              )
            ) : (
              <p class="soft">Choose something to see it.</p>
            )}
          </section>
        </div>
      )}
    </section>
  );
}
