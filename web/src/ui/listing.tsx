/** What a page loads and lists: why it can't be shown, that it is on its way, that there is none of it, or a table. */

import type { ComponentChildren } from 'preact';
import type { Loaded } from '../hooks.ts';
import { Name, Problem, Waiting } from './basics.tsx';

/** What was loaded; before that its place, and beside it the error of the last try. `empty` stands for no items. */
export function Listing<T, I>({
  of,
  items,
  empty,
  children,
}: {
  of: Loaded<T>;
  items: (value: T) => I[];
  empty?: ComponentChildren;
  children: (items: I[], value: T) => ComponentChildren;
}) {
  const found = of.value === undefined ? [] : items(of.value);
  return (
    <>
      <Problem error={of.error} retry={() => void of.reload()} />
      {of.value === undefined ? !of.error && <Waiting /> : found.length ? children(found, of.value) : empty}
    </>
  );
}

/** A column's title: as text; of numbers, which stand to the right; of buttons, not written; or an untrusted name. */
export type Column = string | { number: string } | { actions: string } | { name: string };

function Head({ of }: { of: Column }) {
  if (typeof of === 'string') return <th>{of}</th>;
  if ('number' in of) return <th class="number">{of.number}</th>;
  if ('name' in of)
    return (
      <th>
        <Name>{of.name}</Name>
      </th>
    );
  return (
    <th>
      <span class="unseen">{of.actions}</span>
    </th>
  );
}

/** A table in a box that scrolls by itself; with a label it can be reached by the keyboard, to scroll it. */
export function Table({
  columns,
  label,
  foot,
  children,
}: {
  columns: Column[];
  label?: string;
  foot?: ComponentChildren;
  children: ComponentChildren;
}) {
  const region = label ? { class: 'table-box tall', tabIndex: 0, role: 'region' as const, 'aria-label': label } : null;
  return (
    <div class="table-box" {...region}>
      <table>
        <thead>
          <tr>
            {columns.map((column, at) => (
              <Head key={String(at)} of={column} />
            ))}
          </tr>
        </thead>
        <tbody>{children}</tbody>
      </table>
      {foot}
    </div>
  );
}
