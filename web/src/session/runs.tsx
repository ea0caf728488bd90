/** The records of a session's runs. */

import { useSignal } from '@preact/signals';
import { Fragment } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { at, call, download, send } from '../api.ts';
import { bytes, commandText, exactly } from '../format.ts';
import { useInterval, useLoad } from '../hooks.ts';
import { href } from '../router.ts';
import type { Json, Page, RunRecord } from '../types.ts';
import { Ago, Button, Copy, Empty, Facts, Name, Problem, Status, Waiting } from '../ui/basics.tsx';
import { say, sayError } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Table } from '../ui/listing.tsx';
import { Printed } from '../ui/output.tsx';
import { Tree } from '../ui/tree.tsx';
import { Artifacts } from './artifacts.tsx';
import type { TabProps } from './page.tsx';

const REFRESH_MS = 2000;
const FIRST_BYTES = 256 << 10;

function Written({ session, record, stream }: { session: string; record: RunRecord; stream: 'stdout' | 'stderr' }) {
  const size = record[`${stream}_bytes`];
  const path = at(session, 'runs', record.run_id, stream);
  const [text, setText] = useState<string | null>(null);
  const [error, setError] = useState<Error | undefined>();
  useEffect(() => {
    const controller = new AbortController();
    setError(undefined);
    const headers: Record<string, string> = size > FIRST_BYTES ? { Range: `bytes=0-${FIRST_BYTES - 1}` } : {};
    send(path, { signal: controller.signal, headers })
      .then((response) => response.text())
      .then(setText)
      .catch((failure) => {
        if (!controller.signal.aborted) setError(failure);
      });
    return () => controller.abort();
  }, [path, size, record.status]);
  if (!size && record.status !== 'running') return null;
  return (
    <>
      <header class="section-head">
        <h3>{stream}</h3>
        <span class="soft">{bytes(size)}</span>
        <span class="push" />
        <Button
          kind="quiet"
          icon="down"
          aria-label={`Download ${stream}`}
          title={`Download ${stream}`}
          onClick={() => void download(path, `${record.run_id}.${stream}.txt`).catch(sayError)}
        />
      </header>
      <Problem error={error} />
      {text !== null && <Printed text={text} stream={stream} label={stream} />}
      {size > FIRST_BYTES && <p class="soft">These are the first {bytes(FIRST_BYTES)}. The download has all of it.</p>}
      {record[`${stream}_truncated`] && (
        <p class="soft">The program wrote more; it was cut off at the session’s limit.</p>
      )}
    </>
  );
}

/** What ran, as a line of the list. */
function FirstLine({ run }: { run: RunRecord }) {
  const text = run.command === null ? run.code : `$ ${commandText(run.command)}`;
  const missing = run.code_truncated ? 'a long command' : 'code not kept';
  return (
    <span class={text === null ? 'ran soft' : 'ran one-line mono soft'}>
      {text === null ? missing : <Name>{text.trim().split(/\r?\n/, 1)[0] || '–'}</Name>}
    </span>
  );
}

/** The code or command that ran, as far as the record keeps it. */
function Program({ record, language }: { record: RunRecord; language: string }) {
  const [title, text] = record.command === null ? ['Code', record.code] : ['Command', commandText(record.command)];
  if (text === null) return <p class="soft">The record doesn’t keep the code of this run.</p>;
  return (
    <>
      <header class="section-head">
        <h3>{title}</h3>
        <span class="push" />
        <Copy text={text} label={`Copy the ${title.toLowerCase()}`} />
      </header>
      <div class="cell-box">
        <CodeEditor
          text={text}
          language={record.command === null ? language : 'shell'}
          label={`${title} of the run`}
          readOnly
        />
      </div>
      {record.args.length > 0 && (
        <p class="soft">
          Arguments:{' '}
          {record.args.map((arg, at) => (
            <Fragment key={String(at)}>
              <code>
                <Name>{arg}</Name>
              </code>{' '}
            </Fragment>
          ))}
        </p>
      )}
      {record.code_truncated && <p class="soft">Only the beginning was kept.</p>}
    </>
  );
}

function Connections({ record }: { record: RunRecord }) {
  const { destinations = [], more = 0 } = record.egress;
  if (!destinations.length) return <p class="soft">It connected to nothing.</p>;
  return (
    <Table
      columns={['Host', 'Allowed', { number: 'Connections' }, { number: 'Sent' }, { number: 'Received' }]}
      foot={more > 0 && <p class="soft">and {more} more</p>}
    >
      {destinations.map((each) => (
        <tr key={`${each.host}:${each.port}`}>
          <td>
            <Name>{`${each.host}:${each.port}`}</Name>
            {each.secrets?.length ? <small class="soft"> with {each.secrets.join(', ')}</small> : null}
          </td>
          <td>{each.allowed ? 'yes' : <span class="problem-text">{each.reason ?? 'no'}</span>}</td>
          <td class="number">{each.connections}</td>
          <td class="number">{bytes(each.sent)}</td>
          <td class="number">{bytes(each.received)}</td>
        </tr>
      ))}
    </Table>
  );
}

function Record({ session, language, id }: { session: string; language: string; id: string }) {
  const loaded = useLoad((signal) => call<RunRecord>(at(session, 'runs', id), { signal }), [session, id]);
  const record = loaded.value;
  useInterval(() => void loaded.refresh(), record?.status === 'running' ? REFRESH_MS : null);
  if (!record) return loaded.error ? <Problem error={loaded.error} /> : <Waiting />;
  const stop = async () => {
    try {
      await call(at(session, 'runs', id), { method: 'DELETE' });
      say('The run was stopped.');
      await loaded.reload();
    } catch (error) {
      sayError(error);
    }
  };
  return (
    <>
      <header class="section-head wrap">
        <h2>
          <Name>{record.run_id}</Name>
        </h2>
        <Status>{record.status}</Status>
        <span class="push" />
        {record.status === 'running' && (
          <Button kind="danger" icon="stop" onClick={() => void stop()}>
            Stop
          </Button>
        )}
      </header>
      <Problem error={loaded.error} />
      <Facts
        facts={[
          ['Exit code', record.exit_code ?? '–'],
          ['Ran', record.duration ?? '–'],
          ['Processor', record.cpu_seconds === null ? 'not measured' : `${record.cpu_seconds.toFixed(3)} s`],
          ['Peak memory', record.peak_memory_bytes === null ? 'not measured' : bytes(record.peak_memory_bytes)],
          ['Began', exactly(record.started_at)],
          ['Ended', record.ended_at ? exactly(record.ended_at) : '–'],
          [
            'Left',
            record.state.committed ? (
              <a href={href('sessions', session, 'versions', String(record.state.version))}>
                version {record.state.version}
              </a>
            ) : (
              (record.state.reason ?? 'nothing')
            ),
          ],
          ['Killed at its end', record.reaped === null ? '–' : `${record.reaped} other processes`],
        ]}
      />
      <Program record={record} language={language} />
      <Written session={session} record={record} stream="stdout" />
      <Written session={session} record={record} stream="stderr" />
      {record.artifacts.length > 0 && <h3>Artifacts</h3>}
      <Artifacts session={session} artifacts={record.artifacts} more={record.artifacts_more} />
      <h3>Where it connected</h3>
      <Connections record={record} />
      <details>
        <summary>What was enforced</summary>
        <Tree value={record.enforced as Json} />
      </details>
    </>
  );
}

export function RunsTab({ session, rest }: TabProps) {
  const older = useSignal<{ runs: RunRecord[]; cursor: string | null } | null>(null);
  const first = useLoad(
    (signal) => call<Page & { runs: RunRecord[] }>(at(session.id, 'runs'), { signal, query: { limit: 50 } }),
    [session.id],
  );
  useInterval(() => void first.refresh(), REFRESH_MS);
  const head = first.value?.runs ?? [];
  const known = new Set(head.map((run) => run.run_id));
  const runs = [...head, ...(older.value?.runs ?? []).filter((run) => !known.has(run.run_id))];
  const cursor = older.value ? older.value.cursor : (first.value?.next_cursor ?? null);
  const chosen = rest[0] ?? runs[0]?.run_id;

  const more = async () => {
    try {
      const page = await call<Page & { runs: RunRecord[] }>(at(session.id, 'runs'), { query: { limit: 50, cursor } });
      older.value = { runs: [...(older.value?.runs ?? []), ...page.runs], cursor: page.next_cursor };
    } catch (error) {
      sayError(error);
    }
  };

  if (first.value && !runs.length && !rest[0])
    return (
      <Empty icon="play" title="No runs yet">
        <p class="soft">
          Each run has a record here: how it ended, what it wrote, what it used and where it connected.
        </p>
        <a class="button primary" href={href('sessions', session.id, 'run')}>
          Run something
        </a>
      </Empty>
    );
  return (
    <div class="columns timeline-columns">
      <section>
        <Problem error={first.error} retry={() => void first.reload()} />
        {!first.value && !first.error && <Waiting />}
        <ol class="timeline" aria-label="Runs">
          {runs.map((run) => (
            <li key={run.run_id}>
              <a
                href={href('sessions', session.id, 'runs', run.run_id)}
                aria-current={run.run_id === chosen ? 'true' : undefined}
                class="two-lines"
              >
                <Status>{run.status}</Status>
                {run.exit_code ? <span class="soft">exit {run.exit_code}</span> : null}
                <span class="push" />
                <span class="soft number">{run.duration}</span>
                <span class="soft number when">
                  <Ago time={run.started_at} />
                </span>
                <FirstLine run={run} />
              </a>
            </li>
          ))}
        </ol>
        {cursor && <Button onClick={() => void more()}>Older runs</Button>}
      </section>
      <section>
        {chosen && <Record key={chosen} session={session.id} language={session.language} id={chosen} />}
      </section>
    </div>
  );
}
