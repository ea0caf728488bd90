/** A list of any length, of which only the rows in view are in the page. */

import type { ComponentChildren } from 'preact';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';

const AROUND = 10;

interface Props<T> {
  items: T[];
  height: number;
  label: string;
  keyOf: (item: T) => string;
  row: (item: T) => ComponentChildren;
  onOpen: (item: T) => void;
  /** Called when the end comes into view. */
  onEnd?: (() => void) | undefined;
}

/** Arrow keys, j and k move; Enter opens. The rows are a list box: one tab stop, however many there are. */
export function Rows<T>({ items, height, label, keyOf, row, onOpen, onEnd }: Props<T>) {
  const box = useRef<HTMLDivElement>(null);
  const [view, setView] = useState({ top: 0, size: 800 });
  const [selected, setSelected] = useState(0);

  useLayoutEffect(() => {
    const element = box.current;
    if (!element) return;
    const measure = () => setView({ top: element.scrollTop, size: element.clientHeight });
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  const first = Math.max(0, Math.floor(view.top / height) - AROUND);
  const last = Math.min(items.length, Math.ceil((view.top + view.size) / height) + AROUND);
  useEffect(() => {
    if (last >= items.length) onEnd?.();
  }, [last, items.length]);

  const current = Math.min(selected, items.length - 1);
  const move = (to: number) => {
    const at = Math.max(0, Math.min(items.length - 1, to));
    setSelected(at);
    const element = box.current;
    if (!element) return;
    if (at * height < element.scrollTop) element.scrollTop = at * height;
    else if ((at + 1) * height > element.scrollTop + element.clientHeight)
      element.scrollTop = (at + 1) * height - element.clientHeight;
  };
  const page = Math.max(1, Math.floor(view.size / height) - 1);

  return (
    <div
      class="rows"
      ref={box}
      role="listbox"
      tabIndex={0}
      aria-label={label}
      aria-activedescendant={items.length ? `row-${current}` : undefined}
      onScroll={(event) => setView({ top: event.currentTarget.scrollTop, size: event.currentTarget.clientHeight })}
      onKeyDown={(event) => {
        const steps: { [key: string]: number } = {
          ArrowDown: current + 1,
          j: current + 1,
          ArrowUp: current - 1,
          k: current - 1,
          PageDown: current + page,
          PageUp: current - page,
          Home: 0,
          End: items.length - 1,
        };
        const to = steps[event.key];
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        if (to !== undefined) {
          event.preventDefault();
          move(to);
        } else if (event.key === 'Enter') {
          const item = items[current];
          if (item !== undefined) onOpen(item);
        }
      }}
    >
      <div class="rows-all" role="presentation" style={{ height: `${items.length * height}px` }}>
        {items.slice(first, last).map((item, index) => {
          const at = first + index;
          return (
            // biome-ignore lint/a11y/useKeyWithClickEvents: the list box has the keys
            <div
              key={keyOf(item)}
              id={`row-${at}`}
              role="option"
              tabIndex={-1}
              aria-selected={at === current}
              aria-setsize={items.length}
              aria-posinset={at + 1}
              class="row"
              style={{ top: `${at * height}px`, height: `${height}px` }}
              onClick={() => {
                setSelected(at);
                onOpen(item);
              }}
            >
              {row(item)}
            </div>
          );
        })}
      </div>
    </div>
  );
}
