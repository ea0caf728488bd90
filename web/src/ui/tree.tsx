/** JSON as a tree that opens on demand, and the changes between two values. */

import { useState } from 'preact/hooks';
import { plain } from '../format.ts';
import { digits } from '../numbers.ts';
import type { DataChange, Json } from '../types.ts';

const PAGE = 100;
const LONG = 400;

type Scalar = null | boolean | number | string;

function Leaf({ value }: { value: Scalar }) {
  const [whole, setWhole] = useState(false);
  const kept = digits(value);
  if (kept !== null) return <code class="json-number">{kept}</code>;
  if (typeof value !== 'string')
    return <code class={`json-${value === null ? 'null' : typeof value}`}>{String(value)}</code>;
  const shown = whole || value.length <= LONG ? value : `${value.slice(0, LONG)}…`;
  return (
    <>
      <code class="json-string">
        <bdi>"{whole ? shown : plain(shown.replaceAll('\n', '↵'))}"</bdi>
      </code>
      {(value.length > LONG || value.includes('\n')) && (
        <button type="button" class="link" onClick={() => setWhole(!whole)}>
          {whole ? 'less' : `all ${value.length.toLocaleString('en')} characters`}
        </button>
      )}
    </>
  );
}

function Node({ name, value, depth }: { name: string | number; value: Json; depth: number }) {
  const [open, setOpen] = useState(depth < 2);
  const [shown, setShown] = useState(PAGE);
  const label = <span class="json-key">{typeof name === 'number' ? name : <bdi>{plain(name)}</bdi>}</span>;
  if (value === null || typeof value !== 'object' || digits(value) !== null) {
    return (
      <li>
        <span class="json-row">
          {label} <Leaf value={value as Scalar} />
        </span>
      </li>
    );
  }
  const list = Array.isArray(value);
  const entries: [string | number, Json][] = list ? value.map((each, at) => [at, each]) : Object.entries(value);
  const size = entries.length;
  return (
    <li>
      <button type="button" class="json-row" aria-expanded={open} onClick={() => setOpen(!open)}>
        <span class={open ? 'twist open' : 'twist'}>›</span>
        {label}
        <span class="soft">{list ? `[${size}]` : `{${size}}`}</span>
      </button>
      {open && (
        <ul class="json">
          {entries.slice(0, shown).map(([key, each]) => (
            <Node key={key} name={key} value={each} depth={depth + 1} />
          ))}
          {size > shown && (
            <li>
              <button type="button" class="link" onClick={() => setShown(shown + 10 * PAGE)}>
                {(size - shown).toLocaleString('en')} more
              </button>
            </li>
          )}
        </ul>
      )}
    </li>
  );
}

export function Tree({ value }: { value: Json }) {
  if (value === null || typeof value !== 'object') return <Leaf value={value} />;
  const entries: [string | number, Json][] = Array.isArray(value)
    ? value.map((each, at) => [at, each])
    : Object.entries(value);
  return (
    <ul class="json root">
      {entries.slice(0, 2000).map(([key, each]) => (
        <Node key={key} name={key} value={each} depth={1} />
      ))}
    </ul>
  );
}

function short(value: Json | undefined): string {
  const text = JSON.stringify(value) ?? '';
  return text.length > LONG ? `${text.slice(0, LONG)}…` : text;
}

/** Changes of data, each with what was and what is. */
export function Changes({ changes }: { changes: DataChange[] }) {
  const [shown, setShown] = useState(PAGE);
  return (
    <ul class="changes">
      {changes.slice(0, shown).map((change) => (
        <li key={change.path + change.op}>
          <code class="json-key">
            <bdi>{plain(change.path || '/')}</bdi>
          </code>
          {change.op !== 'add' && (
            <del>
              <span class="unseen">before: </span>
              <bdi>{plain(short(change.old))}</bdi>
            </del>
          )}
          {change.op !== 'remove' && (
            <ins>
              <span class="unseen">after: </span>
              <bdi>{plain(short(change.new))}</bdi>
            </ins>
          )}
        </li>
      ))}
      {changes.length > shown && (
        <li>
          <button type="button" class="link" onClick={() => setShown(shown + 10 * PAGE)}>
            {(changes.length - shown).toLocaleString('en')} more
          </button>
        </li>
      )}
    </ul>
  );
}
