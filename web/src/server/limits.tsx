/** What the operator is shown besides: the limits in force, and what the server's machine has and lacks. */

import { ApiError } from '../api.ts';
import type { Loaded } from '../hooks.ts';
import type { Finding, ServerFacts, SettingInForce } from '../types.ts';
import { Problem, Waiting } from '../ui/basics.tsx';
import { Icon } from '../ui/icons.tsx';

type Props = { loaded: Loaded<ServerFacts> };

/** Whether only the operator may see this. */
export function isOthers(error: Error | undefined): boolean {
  return error instanceof ApiError && error.status === 403;
}

function Found({ findings }: { findings: Finding[] }) {
  return (
    <ul class="checks">
      {findings.map((each) => (
        <li key={`${each.about} ${each.text}`} class={each.there ? '' : 'lacking'}>
          <Icon name={each.there ? 'check' : 'alert'} />
          <span>
            {each.text} <span class="soft">({each.about})</span>
            {each.remedy && <span class="soft block">To get it: {each.remedy}</span>}
          </span>
        </li>
      ))}
    </ul>
  );
}

/** What `era doctor` would say of what this server has tested. */
export function Findings({ loaded }: Props) {
  if (isOthers(loaded.error)) return <p class="soft">The server’s operator sees here what its machine lacks.</p>;
  const findings = loaded.value?.findings ?? [];
  const missing = findings.filter((each) => !each.there);
  const there = findings.filter((each) => each.there);
  return (
    <>
      <h2>Doctor’s findings</h2>
      <Problem error={loaded.error} retry={() => void loaded.reload()} />
      {!loaded.value && !loaded.error && <Waiting />}
      {loaded.value && (
        <>
          {missing.length ? <Found findings={missing} /> : <p>Nothing is missing.</p>}
          <details>
            <summary>{there.length} are there</summary>
            <Found findings={there} />
          </details>
          <p class="soft">
            A kind of sandbox that no session asked for yet isn’t tested; <code>era doctor</code> on the server’s
            machine tests all.
          </p>
        </>
      )}
    </>
  );
}

function shown(value: number | null): string {
  return value === null ? 'not set' : value.toLocaleString('en', { maximumFractionDigits: 3 });
}

function Limit({ limit }: { limit: SettingInForce }) {
  const changed = limit.value !== limit.default;
  return (
    <li>
      <div class="limit-head">
        <code>{limit.name}</code>
        <b class="number">{shown(limit.value)}</b>
      </div>
      <p class="soft">
        {limit.description}
        {changed && ` By default: ${shown(limit.default)}.`}
      </p>
    </li>
  );
}

/** The settings that bound something: first those that were changed. */
export function LimitsInForce({ loaded }: Props) {
  if (!loaded.value) return null;
  const { limits, at_a_time: atATime } = loaded.value;
  const changed = limits.filter((each) => each.value !== each.default);
  const others = limits.filter((each) => each.value === each.default);
  return (
    <section class="limits">
      <h2>Limits in force</h2>
      <p>
        At a time <b>{shown(atATime.runs)}</b> runs may work, and sessions may have <b>{shown(atATime.sandboxes)}</b>{' '}
        sandboxes.
      </p>
      {changed.length > 0 && (
        <ul aria-label="Limits that were set">
          {changed.map((each) => (
            <Limit key={each.name} limit={each} />
          ))}
        </ul>
      )}
      <details>
        <summary>{others.length} are as by default</summary>
        <ul aria-label="Limits by default">
          {others.map((each) => (
            <Limit key={each.name} limit={each} />
          ))}
        </ul>
      </details>
    </section>
  );
}
