/** The dashboard: its frame, and which page is shown. */

import { useSignal } from '@preact/signals';
import { render } from 'preact';
import { useEffect } from 'preact/hooks';
import { apiKey, away, health, keyWanted, returns, useKey, watchHealth } from './api.ts';
import { helpOpen, useCommands } from './commands.ts';
import { loadLanguages } from './languages.ts';
import { NewPage } from './pages/new.tsx';
import { SessionsPage } from './pages/sessions.tsx';
import { go, href, place } from './router.ts';
import { ServerPages } from './server/pages.tsx';
import { SessionPage } from './session/page.tsx';
import { Button, Form, TextField } from './ui/basics.tsx';
import { Dialog, Overlays } from './ui/dialog.tsx';
import { Icon } from './ui/icons.tsx';
import { PaletteAndHelp, PaletteButton } from './ui/palette.tsx';
import { nextTheme, setTheme, theme } from './ui/theme.ts';

const PAGES: [path: string, title: string, icon: string, keys: string][] = [
  ['sessions', 'Sessions', 'sessions', 'g s'],
  ['server', 'Server', 'server', 'g v'],
  ['storage', 'Storage', 'storage', 'g t'],
  ['usage', 'Usage', 'usage', 'g u'],
  ['webhooks', 'Webhooks', 'webhook', 'g w'],
  ['keys', 'Keys', 'key', 'g k'],
  ['audit', 'Audit', 'audit', 'g a'],
];

const THEMES = {
  auto: ['auto', 'Colours: as the system'],
  light: ['sun', 'Colours: light'],
  dark: ['moon', 'Colours: dark'],
};

function KeyDialog() {
  const key = useSignal('');
  return (
    <Dialog
      title="This server needs a key"
      onClose={() => {
        keyWanted.value = false;
      }}
    >
      <Form onSubmit={() => useKey(key.value.trim())}>
        {apiKey.value && <p class="problem-text">The key that this tab has isn’t one of the server’s.</p>}
        <TextField
          label="API key"
          type="password"
          hint="It is kept until this tab is closed, and sent to this server only."
          value={key.value}
          onText={(text) => {
            key.value = text;
          }}
        />
        <footer>
          <Button kind="primary" type="submit" disabled={!key.value.trim()}>
            Use this key
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

function Away() {
  return (
    <div class={away.value ? 'away seen' : 'away'} role="status">
      {away.value && (
        <>
          <Icon name="alert" />
          <span>The server is away. What you typed is kept; this page goes on as soon as it is back.</span>
        </>
      )}
    </div>
  );
}

function Nav() {
  const current = place.value.parts[0] ?? 'sessions';
  const at = current === 'new' ? 'sessions' : current;
  const [icon = '', title = ''] = THEMES[theme.value];
  return (
    <nav class="side" aria-label="Dashboard">
      <a class="mark" href="#/">
        <img src="/assets/dashboard-icon.svg" alt="" width="24" height="24" />
        ERA
      </a>
      <PaletteButton />
      <ul>
        {PAGES.map(([path, name, symbol]) => (
          <li key={path}>
            <a href={href(path)} aria-current={at === path ? 'page' : undefined}>
              <Icon name={symbol} size={18} />
              {name}
            </a>
          </li>
        ))}
        <li class="docs-link">
          <a href="/docs/guide">
            <Icon name="guide" size={18} />
            Guide
          </a>
        </li>
        <li class="docs-link">
          <a href="/docs">
            <Icon name="docs" size={18} />
            API
          </a>
        </li>
      </ul>
      <div class="side-foot">
        <span class={away.value ? 'status bad' : 'status good'}>
          <span class="dot" />
          {away.value ? 'away' : health.value ? `ERA ${health.value.version}` : 'asking…'}
        </span>
        <span class="side-buttons">
          {apiKey.value && (
            <Button
              kind="quiet"
              icon="leave"
              aria-label="Forget the key"
              title="Forget the key"
              onClick={() => {
                useKey('');
              }}
            />
          )}
          <Button kind="quiet" icon={icon} aria-label={title} title={title} onClick={nextTheme} />
        </span>
      </div>
    </nav>
  );
}

function Page() {
  const [page = 'sessions', ...rest] = place.value.parts;
  if (page === 'new') return <NewPage />;
  if (page === 'sessions' && rest[0])
    return <SessionPage key={rest[0]} id={rest[0]} tab={rest[1] ?? 'run'} rest={rest.slice(2)} />;
  if (page !== 'sessions' && PAGES.some(([path]) => path === page)) return <ServerPages page={page} rest={rest} />;
  return <SessionsPage />;
}

function App() {
  const epoch = returns.value;
  useEffect(() => {
    void loadLanguages().catch(() => undefined);
  }, [epoch]);
  useEffect(() => {
    const [page, id] = place.value.parts;
    const name = page === 'sessions' && id ? id : (PAGES.find(([path]) => path === page)?.[1] ?? '');
    document.title = name ? `${name} · ERA` : 'ERA';
  }, [place.value]);
  useCommands(
    [
      ...PAGES.map(([path, title, , keys]) => ({ title, keys, group: 'Go to', run: () => go(path) })),
      { title: 'New session', keys: 'n', group: 'Do', run: () => go('new') },
      { title: 'Guide', group: 'Go to', run: () => location.assign('/docs/guide') },
      { title: 'API reference', group: 'Go to', run: () => location.assign('/docs') },
      { title: 'Light colours', group: 'Colours', run: () => setTheme('light') },
      { title: 'Dark colours', group: 'Colours', run: () => setTheme('dark') },
      { title: 'Colours as the system', group: 'Colours', run: () => setTheme('auto') },
      { title: 'Enter an API key', group: 'Do', run: () => (keyWanted.value = true) },
      { title: 'Keys', group: 'Help', run: () => (helpOpen.value = true) },
    ],
    [],
  );
  return (
    <>
      <button type="button" class="skip" onClick={() => document.getElementById('main')?.focus()}>
        Skip to content
      </button>
      <Nav />
      <main id="main" tabIndex={-1}>
        <Away />
        <Page />
      </main>
      {keyWanted.value && <KeyDialog />}
      <PaletteAndHelp />
      <Overlays />
    </>
  );
}

void watchHealth();
const app = document.getElementById('app');
// In its place is what is seen while this script is loaded.
app?.replaceChildren();
if (app) render(<App />, app);
