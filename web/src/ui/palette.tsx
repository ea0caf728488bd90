/** The command palette (Ctrl+K) and the list of keys (?). */

import { useEffect, useId, useMemo, useRef, useState } from 'preact/hooks';
import { allCommands, type Command, helpOpen, paletteOpen } from '../commands.ts';
import { go } from '../router.ts';
import { sessionsKnown } from '../sessions.ts';
import { Dialog } from './dialog.tsx';
import { Icon } from './icons.tsx';

const MOST = 60;

/** Whether all words of the query occur in a text. */
function matches(query: string, text: string): boolean {
  const lower = text.toLowerCase();
  return query
    .toLowerCase()
    .split(/\s+/)
    .every((word) => lower.includes(word));
}

function Palette({ onClose }: { onClose: () => void }) {
  const [query, setQuery] = useState('');
  const [at, setAt] = useState(0);
  const list = useRef<HTMLDivElement>(null);
  const id = useId();
  const found = useMemo(() => {
    const sessions: Command[] = sessionsKnown().map((session) => ({
      title: session.id,
      group: 'Session',
      run: () => go('sessions', session.id),
    }));
    return [...allCommands(), ...sessions]
      .filter((command) => matches(query, `${command.group} ${command.title}`))
      .slice(0, MOST);
  }, [query]);
  const current = Math.min(at, found.length - 1);
  useEffect(() => {
    list.current?.children[current]?.scrollIntoView({ block: 'nearest' });
  }, [current]);
  const run = (command: Command | undefined) => {
    onClose();
    // The dialog gives the focus back first; a command may put it elsewhere.
    if (command) setTimeout(command.run);
  };
  return (
    <Dialog title="Commands" onClose={onClose}>
      <div class="palette">
        <input
          type="text"
          role="combobox"
          aria-label="Find a command or a session"
          aria-expanded="true"
          aria-controls={id}
          aria-activedescendant={found.length ? `${id}-${current}` : undefined}
          placeholder="Find a command or a session"
          autocomplete="off"
          spellcheck={false}
          value={query}
          onInput={(event) => {
            setQuery(event.currentTarget.value);
            setAt(0);
          }}
          onKeyDown={(event) => {
            if (event.key === 'ArrowDown') setAt(Math.min(current + 1, found.length - 1));
            else if (event.key === 'ArrowUp') setAt(Math.max(current - 1, 0));
            else if (event.key === 'Enter') run(found[current]);
            else return;
            event.preventDefault();
          }}
        />
        <div ref={list} id={id} role="listbox" aria-label="Found">
          {found.map((command, index) => (
            // biome-ignore lint/a11y/useKeyWithClickEvents: the combobox has the keys
            <div
              key={`${command.group}/${command.title}`}
              id={`${id}-${index}`}
              role="option"
              tabIndex={-1}
              aria-selected={index === current}
              onClick={() => run(command)}
            >
              <span class="soft">{command.group}</span>
              <bdi>{command.title}</bdi>
              {command.keys && <Keys keys={command.keys} />}
            </div>
          ))}
        </div>
        {!found.length && (
          <p class="soft pad" role="status">
            Nothing has these words in it.
          </p>
        )}
      </div>
    </Dialog>
  );
}

export function Keys({ keys }: { keys: string }) {
  return (
    <span class="keys">
      {keys.split(' ').map((key) => (
        <kbd key={key}>{key}</kbd>
      ))}
    </span>
  );
}

const ALWAYS: [keys: string, title: string][] = [
  ['Ctrl K', 'Commands and sessions'],
  ['?', 'This list'],
  ['Esc', 'Close, or leave the editor with Tab'],
  ['Ctrl Enter', 'Run what is in the editor'],
  ['Ctrl S', 'Save what is in the editor'],
  ['↑ ↓', 'Move in lists (j and k, too)'],
  ['Enter', 'Open'],
];

function Help({ onClose }: { onClose: () => void }) {
  const commands = allCommands().filter((command) => command.keys);
  return (
    <Dialog title="Keys" onClose={onClose}>
      <dl class="shortcuts">
        {[...ALWAYS, ...commands.map((each): [string, string] => [each.keys ?? '', each.title])].map(
          ([keys, title]) => (
            <div key={keys + title}>
              <dt>
                <Keys keys={keys} />
              </dt>
              <dd>{title}</dd>
            </div>
          ),
        )}
      </dl>
    </Dialog>
  );
}

export function PaletteButton() {
  return (
    <button
      type="button"
      class="find"
      onClick={() => {
        paletteOpen.value = true;
      }}
    >
      <Icon name="search" />
      <span>Find</span>
      <Keys keys="Ctrl K" />
    </button>
  );
}

export function PaletteAndHelp() {
  return (
    <>
      {paletteOpen.value && (
        <Palette
          onClose={() => {
            paletteOpen.value = false;
          }}
        />
      )}
      {helpOpen.value && (
        <Help
          onClose={() => {
            helpOpen.value = false;
          }}
        />
      )}
    </>
  );
}
