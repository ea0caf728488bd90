/** A server that is full, away, or wants a key; and how soon there is something to see. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Page } from 'playwright-core';
import { api, eventually, KEYED_SERVER, Line, newId, PATIENCE, SERVER, withPage } from './harness.ts';

/** Answer the page's calls for sessions with these, as many at a time as it asks for. */
const serveSessions = (page: Page, all: () => object[]) =>
  page.route(/\/api\/sessions\?/, async (route) => {
    const query = new URL(route.request().url()).searchParams;
    const from = Number(query.get('cursor') ?? 0);
    const to = from + Number(query.get('limit'));
    const sessions = all().slice(from, to);
    await route.fulfill({
      json: { sessions, count: sessions.length, next_cursor: to < all().length ? String(to) : null },
    });
  });

test('ten thousand sessions scroll (soak)', async () => {
  // The server's answers are made up here: to create as many would take minutes, and the list is what is tested.
  const all = Array.from({ length: 10_000 }, (_, at) => ({
    id: `many-${String(at).padStart(5, '0')}`,
    created_at: new Date(1.8e12 - at * 1000).toISOString(),
    last_run_at: '',
    language: ['python', 'node', 'go'][at % 3],
    metadata: { team: ['blue', 'red'][at % 2] },
    version: at,
    file_count: 0,
    total_size_bytes: 0,
    status: 'idle',
    expires_at: null,
  }));
  await withPage(async (page) => {
    await serveSessions(page, () => all);
    await page.goto(SERVER);
    await page.getByText('10,000', { exact: true }).waitFor();
    const list = page.getByRole('listbox', { name: 'Sessions' });
    assert.ok((await list.getByRole('option').count()) < 60, 'only those in view are in the page');
    // The processor's time of the page's thread, so that it doesn't matter what else the machine does.
    const devtools = await page.context().newCDPSession(page);
    await devtools.send('Performance.enable', { timeDomain: 'threadTicks' });
    const worked = async () =>
      (await devtools.send('Performance.getMetrics')).metrics.find(({ name }) => name === 'TaskDuration')?.value ?? NaN;
    let slowest = 0;
    for (let step = 0; step <= 100; step++) {
      const before = await worked();
      await list.evaluate(async (element, part) => {
        element.scrollTop = element.scrollHeight * part;
        await new Promise(requestAnimationFrame);
        await new Promise(requestAnimationFrame); // what the first one shows is in the page
      }, step / 100);
      slowest = Math.max(slowest, (await worked()) - before);
    }
    await list.getByRole('option', { name: 'many-09999' }).waitFor();
    assert.ok(slowest > 0 && slowest < 0.5, `a step of a hundred took ${slowest} s of the processor`);
    await list.press('Home');
    await list.press('ArrowDown');
    await list.press('j');
    await list.press('Enter');
    await page.waitForURL(/many-00002/);
    await page.goBack();
    await page.getByRole('searchbox', { name: 'Search sessions' }).fill('many-0777');
    await page.getByText('10', { exact: true }).waitFor();
    await page.getByRole('searchbox', { name: 'Search sessions' }).fill('nothing like it');
    await page.getByRole('heading', { name: 'No session matches' }).waitFor();
  });
});

test('more new sessions than a page holds are all listed', () =>
  withPage(async (page) => {
    const made = (from: number, to: number) =>
      Array.from({ length: to - from }, (_, at) => ({
        id: `new-${to - at}`,
        created_at: new Date(1.8e12 + (to - at) * 1000).toISOString(),
        last_run_at: '',
        language: 'python',
        metadata: {},
        version: 1,
        file_count: 0,
        total_size_bytes: 0,
        status: 'idle',
        expires_at: null,
      }));
    let all = made(0, 300);
    await serveSessions(page, () => all);
    await page.goto(SERVER);
    await page.getByText('300', { exact: true }).waitFor();
    all = made(0, 800);
    await page.getByText('800', { exact: true }).waitFor();
  }));

test('a server that is slower than its page asks is shown all the same (soak)', () =>
  withPage(async (page) => {
    const id = newId('slow');
    await api('/api/sessions', { language: 'python', session_id: id });
    await api(`/api/sessions/${id}/run`, { code: 'print(1)' });
    await page.route(/\/runs\?limit=50/, async (route) => {
      await new Promise((done) => setTimeout(done, 3000)); // longer than the two seconds between two calls
      await route.continue().catch(() => undefined);
    });
    await page.goto(`${SERVER}/#/sessions/${id}/runs`);
    await page.getByRole('list', { name: 'Runs' }).getByRole('link').waitFor();
  }));

test('a call that hangs is given up for another one', () =>
  withPage(async (page) => {
    const id = newId('hung');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.clock.install();
    await page.goto(`${SERVER}/#/sessions/${id}/runs`);
    await page.getByText('No runs yet').waitFor();
    const asked = page.waitForRequest(/\/runs\?limit=50/);
    await page.route(/\/runs\?limit=50/, () => undefined, { times: 1 }); // it is never answered
    await page.clock.runFor(3000);
    await asked;
    await api(`/api/sessions/${id}/run`, { code: 'print(1)' });
    await page.clock.runFor(40_000);
    await page.getByRole('list', { name: 'Runs' }).getByRole('link').waitFor();
  }));

test('an inbox is shown while it can’t be loaded again (soak)', () =>
  withPage(async (page) => {
    const id = newId('inbox');
    await api('/api/sessions', { language: 'python', session_id: id });
    await api(`/api/sessions/${id}/inbox`, { retries: 0 }, 'PUT');
    await page.goto(`${SERVER}/#/sessions/${id}/inbox`);
    await page.getByRole('heading', { name: 'Deliveries' }).waitFor();
    await page.route(/\/inbox$/, (route) => route.fulfill({ status: 503, json: { error: 'Busy.', code: 'busy' } }));
    await page.getByRole('alert').getByText('Busy.').waitFor();
    await page.getByRole('heading', { name: 'Deliveries' }).waitFor();
    await page.unroute(/\/inbox$/);
    await page.getByRole('alert').waitFor({ state: 'detached' });
  }));

test('a session that is deleted elsewhere says so', () =>
  withPage(async (page) => {
    const id = newId('elsewhere');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(`${SERVER}/#/sessions/${id}/settings`);
    await page.getByRole('heading', { name: 'About it' }).waitFor();
    await api(`/api/sessions/${id}`, undefined, 'DELETE');
    await page.getByRole('alert').getByText('There is no session').waitFor();
  }));

test('what is copied is there without a secure context too, and a tick says so only then', () =>
  withPage(async (page) => {
    const id = newId('copied');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.addInitScript(() => Object.defineProperty(navigator, 'clipboard', { value: undefined }));
    await page.goto(`${SERVER}/#/sessions/${id}/settings`);
    const copy = page.getByRole('button', { name: 'Copy the id' });
    const icon = () => copy.locator('path').first().getAttribute('d');
    const plain = await icon();
    await copy.click();
    await eventually(async () => (await icon()) !== plain, 'there is a tick');
    const tick = await icon();
    await page.getByLabel('Labels').fill('');
    await page.getByLabel('Labels').press('ControlOrMeta+v');
    assert.equal(await page.getByLabel('Labels').inputValue(), id);
    await eventually(async () => (await icon()) === plain, 'the tick has gone');
    await page.evaluate(() => {
      document.execCommand = () => false;
    });
    await copy.click();
    await eventually(async () => (await icon()) !== plain, 'there is a sign');
    assert.notEqual(await icon(), tick);
  }));

test('the storage shows more than a thousand things, and keys with any slashes (soak)', () =>
  withPage(async (page) => {
    const keys = ['/odd//key/', 'a/../b'];
    for (const key of keys)
      await api(`/api/storage/kv/slashes/${encodeURIComponent(key)}`, { value: `of ${key}` }, 'PUT');
    await page.goto(`${SERVER}/#/storage`);
    await page.getByLabel('Namespace').selectOption('slashes');
    for (const key of keys) {
      await page.getByRole('list', { name: 'Stored' }).getByRole('link', { name: key }).click();
      await page.getByRole('region', { name: 'Value' }).getByText(`of ${key}`).waitFor();
    }
    const all = Array.from({ length: 1300 }, (_, at) => ({ type: 'kv', namespace: 'many', key: `key-${at}`, size: 1 }));
    await page.route(/\/api\/resources\/list/, async (route) => {
      const query = new URL(route.request().url()).searchParams;
      const limit = Number(query.get('limit'));
      const from = Number(query.get('offset') ?? 0);
      if (limit > 1000) return route.fulfill({ status: 400, json: { error: 'too many' } });
      const resources = all.slice(from, from + limit);
      await route.fulfill({ json: { resources, total: all.length, has_more: from + resources.length < all.length } });
    });
    await page.reload();
    for (let shown = 200; shown < 1300; shown += 200) {
      await page.getByText(`key-${shown - 1}`, { exact: true }).waitFor();
      await page.getByRole('button', { name: 'More' }).click();
    }
    await page.getByText('key-1299', { exact: true }).waitFor();
    await page.getByRole('button', { name: 'More' }).waitFor({ state: 'detached' });
  }));

test('a server that goes away and comes back', async () => {
  const line = await Line.laid();
  const id = newId('steady');
  await api('/api/sessions', { language: 'python', session_id: id });
  await withPage(async (page) => {
    await page.goto(`${line.url}/#/sessions/${id}`);
    const editor = page.getByRole('textbox', { name: 'Code' });
    await editor.fill('print("typed before")');
    await line.cut();
    await page.getByText('The server is away.').waitFor();
    await page.getByRole('button', { name: 'Store' }).click();
    await page.getByText('The server can’t be reached.').first().waitFor();
    await page.getByRole('link', { name: 'Data', exact: true }).click();
    await page.getByRole('link', { name: 'Code', exact: true }).click();
    await line.mend();
    await page.getByText('The server is away.').waitFor({ state: 'detached' });
    await page.locator('.cm-content', { hasText: 'typed before' }).waitFor();
    await page.getByRole('button', { name: 'Store' }).click();
    await page.locator('.toast', { hasText: 'The code is stored.' }).waitFor();
    assert.equal((await api<{ code: string }>(`/api/sessions/${id}/code`)).code, 'print("typed before")');
  }).finally(() => line.cut());
});

test('a server with a key asks for it, and keeps it out of URLs', () =>
  withPage(async (page) => {
    const urls: string[] = [];
    page.on('request', (request) => urls.push(request.url()));
    await page.goto(KEYED_SERVER);
    await page.getByRole('dialog', { name: 'This server needs a key' }).waitFor();
    await page.getByLabel('API key').fill('wrong');
    await page.getByRole('button', { name: 'Use this key' }).click();
    await page.getByText('isn’t one of the server’s').waitFor();
    await page.getByLabel('API key').fill('open sesame');
    await page.getByRole('button', { name: 'Use this key' }).click();
    await page.getByRole('heading', { name: 'No sessions yet' }).waitFor();
    await page.reload();
    await page.getByRole('heading', { name: 'No sessions yet' }).waitFor();
    await page.goto(`${KEYED_SERVER}/#/keys`);
    await page.getByRole('button', { name: 'New key' }).click();
    await page.getByLabel('Owner').fill('mina');
    await page.getByRole('button', { name: 'Create', exact: true }).click();
    await page.getByText('It is shown this once only.').waitFor();
    await page.getByRole('button', { name: 'Done' }).click();
    await page.getByRole('cell', { name: 'mina' }).waitFor();
    await page.keyboard.press('g');
    await page.keyboard.press('u');
    await page.getByRole('button', { name: 'Set quotas of mina' }).click();
    await page.getByLabel('Sessions', { exact: true }).fill('1');
    await page.getByRole('button', { name: 'Set', exact: true }).click();
    await page.locator('.toast', { hasText: 'The quotas are set.' }).waitFor();
    await page.getByRole('row', { name: /^mina 0 of 1 / }).waitFor();
    await page.keyboard.press('g');
    await page.keyboard.press('a');
    await page.getByRole('heading', { name: 'Audit' }).waitFor();
    await page.getByRole('row', { name: /operator.*key\.create.*owner: mina/ }).waitFor();
    await page.getByLabel('Show').selectOption('session.delete');
    await page.getByText('Nothing yet').waitFor();
    // A terminal is let in by a ticket, since a page's WebSocket can't carry the key.
    await api('/api/sessions', { language: 'python', session_id: 'keyed' }, 'POST', KEYED_SERVER, 'open sesame');
    await page.goto(`${KEYED_SERVER}/#/sessions/keyed/terminal`);
    await page.getByRole('button', { name: 'New shell' }).click();
    await page.waitForURL(/terminal\/proc_/);
    await page.keyboard.type('echo in-$((40 + 2))\n');
    await page.locator('.xterm-rows').getByText('in-42', { exact: true }).waitFor();
    assert.deepEqual(
      urls.filter((url) => /sesame|wrong/.test(url)),
      [],
    );
    assert.equal(await page.evaluate(() => localStorage.length), 0);
  }));

test('an error shows its hint, and what was typed stays', () =>
  withPage(async (page) => {
    const id = newId('taken');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(`${SERVER}/#/new`);
    await page.getByLabel('Id', { exact: true }).fill(id);
    await page.getByRole('button', { name: 'Create session' }).click();
    const problem = page.getByRole('alert');
    await problem.waitFor();
    assert.match((await problem.textContent()) ?? '', /exists|taken/);
    assert.equal(await page.getByLabel('Id', { exact: true }).inputValue(), id);
  }));

test('numbers that JavaScript has no room for survive an edit of the data', () =>
  withPage(async (page) => {
    const id = newId('numbers');
    await api('/api/sessions', { language: 'python', session_id: id });
    const data = '{"data": {"large": 12345678901234567890, "float": 1.0, "word": "owl"}}';
    const headers = { 'Content-Type': 'application/json' };
    await fetch(`${SERVER}/api/sessions/${id}`, { method: 'PATCH', headers, body: data });
    await page.goto(`${SERVER}/#/sessions/${id}/data`);
    await page.locator('.json', { hasText: '12345678901234567890' }).waitFor();
    await page.getByRole('button', { name: 'Edit' }).click();
    const editor = page.getByRole('textbox', { name: 'Data' });
    await editor.getByText('owl').waitFor();
    // What is edited is what the editor shows.
    const shown = (await editor.locator('.cm-line').allInnerTexts()).join('\n');
    assert.match(shown, /"large": 12345678901234567890/);
    await editor.fill(shown.replace('owl', 'hawk'));
    await page.getByRole('button', { name: 'Save' }).click();
    await page.locator('.json', { hasText: 'hawk' }).waitFor();
    const stored = await (await fetch(`${SERVER}/api/sessions/${id}`)).text();
    assert.match(stored, /"large": ?12345678901234567890/);
    assert.match(stored, /"float": ?1\.0/);
  }));

test('a session that was deleted comes back', () =>
  withPage(async (page) => {
    const id = newId('gone');
    await api('/api/sessions', { language: 'python', session_id: id, data: { n: 1 } });
    await api(`/api/sessions/${id}`, undefined, 'DELETE');
    await page.goto(SERVER);
    await page.getByLabel('Status').selectOption('deleted');
    await page.getByRole('option', { name: id }).click();
    await page.getByRole('dialog').getByRole('button', { name: 'Restore' }).click();
    await eventually(async () => (await fetch(`${SERVER}/api/sessions/${id}`)).ok, 'it is there again');
    await page.getByRole('heading', { name: id }).waitFor();
    assert.equal((await api<{ status: string }>(`/api/sessions/${id}`)).status, 'idle');
  }));

test('there is something to see soon', () =>
  withPage(async (page) => {
    await page.goto(SERVER);
    await page.getByRole('heading', { name: 'Sessions' }).waitFor();
    await eventually(
      () => page.evaluate(() => performance.getEntriesByName('first-contentful-paint').length > 0),
      'there is a first paint',
    );
    const paint = await page.evaluate(() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0);
    console.log(`first contentful paint after ${Math.round(paint)} ms`);
    assert.ok(paint < PATIENCE);
    // How long that takes is the machine's affair; how much has to come before it isn't.
    const loaded = await page.evaluate(() =>
      (performance.getEntriesByType('resource') as PerformanceResourceTiming[])
        .filter((entry) => /\.(js|css)$/.test(entry.name))
        .map((entry) => ({ name: entry.name, size: entry.decodedBodySize })),
    );
    const size = loaded.reduce((sum, each) => sum + each.size, 0);
    assert.ok(size > 0 && size < 250_000, `${size} bytes: ${JSON.stringify(loaded)}`);
    // Editor and plots are loaded where they are needed, not before.
    assert.deepEqual(
      loaded.filter((each) => /codemirror|uPlot|xterm/.test(each.name)),
      [],
    );
  }));

test('a webhook is made, and its notice sent once more', () =>
  withPage(async (page) => {
    await page.goto(`${SERVER}/#/webhooks`);
    const create = async (url: string) => {
      await page.getByRole('button', { name: 'New webhook' }).click();
      await page.getByLabel('URL').fill(url);
      await page.getByRole('button', { name: 'Create', exact: true }).click();
    };
    await create('http://10.0.0.1/');
    await page.getByRole('alert').getByText('ERA_EGRESS_PRIVATE').waitFor();
    assert.equal(await page.getByLabel('URL').inputValue(), 'http://10.0.0.1/');
    await page.getByRole('button', { name: 'Cancel' }).click();
    await create('http://203.0.113.7/era');
    await page.getByText('It is shown this once only.').waitFor();
    await page.getByText(/^whsec_/).waitFor();
    await page.getByRole('button', { name: 'Done' }).click();
    await page.getByRole('link', { name: /203\.0\.113\.7/ }).waitFor();
    await api('/api/sessions', { language: 'python', session_id: newId('told') });
    await page.getByRole('button', { name: 'Replay session.created' }).click();
    await page.locator('.toast', { hasText: 'It is sent once more.' }).waitFor();
    await page.getByRole('button', { name: /Delete the webhook/ }).click();
    await page.getByRole('dialog').getByRole('button', { name: 'Delete' }).click();
    await page.getByRole('heading', { name: 'No webhooks yet' }).waitFor();
  }));
