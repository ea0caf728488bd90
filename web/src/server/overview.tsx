/** The server at a glance: health, load, isolation in force, what is missing, languages. */

import { useEffect } from 'preact/hooks';
import { away, call, health } from '../api.ts';
import { useInterval, useLoad } from '../hooks.ts';
import { languages } from '../languages.ts';
import { href } from '../router.ts';
import type { Json, RunRecord, ServerFacts } from '../types.ts';
import { Ago, Facts, Name, Problem, Status, Waiting } from '../ui/basics.tsx';
import { Icon } from '../ui/icons.tsx';
import { Tree } from '../ui/tree.tsx';
import { HostsOfCluster } from './hosts.tsx';
import { Findings, LimitsInForce } from './limits.tsx';
import { metricsError, type Sample, samples, startSampling, total } from './metrics.ts';
import { Plot } from './plot.tsx';

const COLORS = ['--plot-1', '--plot-2', '--plot-3', '--plot-4', '--plot-5'];

/** One line for each value of a label. */
function byLabel(all: Sample[], name: string, label: string) {
  const pattern = new RegExp(`^${name}\\{.*${label}="([^"]*)"`);
  const found = new Set<string>();
  for (const key of all.at(-1)?.values.keys() ?? []) {
    const match = pattern.exec(key);
    if (match?.[1]) found.add(match[1]);
  }
  return [...found].slice(0, COLORS.length).map((value, at) => ({
    label: value,
    values: all.map((each) => total(each.values, name, `${label}="${value}"`)),
    color: COLORS[at] ?? '',
  }));
}

/** How many more there were in each sample than in the one before, a minute. */
function rate(all: Sample[], name: string) {
  return all.map((each, at) => {
    const before = all[at - 1];
    const now = total(each.values, name);
    const then = before && total(before.values, name);
    if (!before || now === null || then === null || then === undefined) return null;
    return (Math.max(0, now - then) * 60) / (each.at - before.at);
  });
}

const RUNS = 12;
const REFRESH_MS = 5000;

/** The newest runs, of whichever session. */
function LatestRuns() {
  const loaded = useLoad((signal) => call<{ runs: RunRecord[] }>('/api/runs', { signal, query: { limit: RUNS } }), []);
  useInterval(() => void loaded.refresh(), REFRESH_MS);
  const runs = loaded.value?.runs ?? [];
  return (
    <>
      <h2>Latest runs</h2>
      <Problem error={loaded.error} />
      {loaded.value && !runs.length && <p class="soft">None yet.</p>}
      <ol class="timeline" aria-label="Latest runs">
        {runs.map((run) => (
          <li key={run.run_id}>
            <a href={href('sessions', run.session_id, 'runs', run.run_id)}>
              <Status>{run.status}</Status>
              <span class="one-line">
                <Name>{run.session_id}</Name>
              </span>
              <span class="push" />
              <span class="soft number">{run.duration}</span>
              <span class="soft number when">
                <Ago time={run.started_at} />
              </span>
            </a>
          </li>
        ))}
      </ol>
    </>
  );
}

export function OverviewPage() {
  useEffect(startSampling, []);
  const facts = useLoad((signal) => call<ServerFacts>('/api/server', { signal }), []);
  const now = health.value;
  const all = samples.value;
  const times = all.map((each) => each.at);
  const last = all.at(-1)?.values;
  const missing = Object.entries(now?.isolation.missing ?? {});
  return (
    <section class="page">
      <header class="page-head">
        <h1>Server</h1>
        {now && (
          <p class="session-facts">
            <Status>{away.value ? 'away' : now.status}</Status>
            <span>ERA {now.version}</span>
          </p>
        )}
      </header>
      {!now && <Waiting />}
      {now && (
        <div class="tiles">
          <div class="tile">
            <b>{last ? (total(last, 'era_sessions') ?? 0).toLocaleString('en') : '–'}</b>
            <span>sessions</span>
          </div>
          {Object.entries(now.sandboxes).map(([use, number]) => (
            <div class="tile" key={use}>
              <b>{number}</b>
              <span>
                {use === 'live'
                  ? 'sandboxes in sessions'
                  : use === 'busy'
                    ? 'busy now'
                    : use === 'ready'
                      ? 'ready for the next'
                      : use}
              </span>
            </div>
          ))}
        </div>
      )}
      <Problem error={metricsError.value} />
      <div class="plots">
        <Plot title="Sandboxes" times={times} series={byLabel(all, 'era_sandboxes', 'state')} />
        <Plot
          title="Waiting"
          times={times}
          series={[
            {
              label: 'runs',
              values: all.map((each) => total(each.values, 'era_admission_waiting')),
              color: '--plot-1',
            },
            {
              label: 'sessions',
              values: all.map((each) => total(each.values, 'era_sandbox_places_waiting')),
              color: '--plot-2',
            },
          ]}
        />
        <Plot
          title="Runs a minute"
          times={times}
          series={[{ label: 'ended or begun', values: rate(all, 'era_runs'), color: '--plot-1' }]}
        />
        <Plot
          title="Sessions"
          times={times}
          series={[{ label: 'all', values: all.map((each) => total(each.values, 'era_sessions')), color: '--plot-2' }]}
        />
      </div>
      <HostsOfCluster />
      {now && (
        <div class="columns">
          <section>
            <h2>Isolation in force</h2>
            <ul class="checks">
              {now.isolation.summary.split('; ').map((part) => (
                <li key={part}>
                  <Icon name="check" />
                  {part}
                </li>
              ))}
              {missing.map(([name, why]) => (
                <li key={name} class="lacking">
                  <Icon name="alert" />
                  {String(why)}
                </li>
              ))}
              {typeof now.isolation.network_reason === 'string' && (
                <li class="lacking">
                  <Icon name="alert" />
                  {now.isolation.network_reason}
                </li>
              )}
            </ul>
            <details>
              <summary>All of it</summary>
              <Tree value={now.isolation as Json} />
            </details>
            <Findings loaded={facts} />
            <LatestRuns />
          </section>
          <section>
            <h2>Languages</h2>
            <Facts
              facts={languages.value.map((each) => [
                each.title,
                each.available ? (
                  <span class="mono">{each.version}</span>
                ) : (
                  <span class="problem-text">
                    {each.reason} {each.hint}
                  </span>
                ),
              ])}
            />
            <h2>Runs on record, of all owners</h2>
            {last && <Facts facts={runFacts(last)} />}
          </section>
        </div>
      )}
      <LimitsInForce loaded={facts} />
    </section>
  );
}

function runFacts(values: Map<string, number>): [string, string][] {
  const facts: [string, string][] = [];
  for (const [key, value] of values) {
    const match = /^era_runs\{.*status="([^"]*)"/.exec(key);
    if (match?.[1]) facts.push([match[1], value.toLocaleString('en')]);
  }
  return facts.length ? facts : [['all', '0']];
}
