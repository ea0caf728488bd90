/** What was typed and what a run shows outlive a change of the page, and no save replaces unasked what came meanwhile. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Page } from 'playwright-core';
import { api, eventually, newId, SERVER, withPage } from './harness.ts';

const part = (id: string, name: string) => `${SERVER}/#/sessions/${id}/${name}`;
const button = (page: Page, name: string) => page.getByRole('button', { name, exact: true });
const editor = (page: Page, name: string) => page.getByRole('textbox', { name });
const said = (page: Page, text: string) => page.locator('.toast', { hasText: text }).waitFor();
const file = async (id: string, path: string) => (await fetch(`${SERVER}/api/sessions/${id}/files/${path}`)).text();
const run = (id: string, code: string) => api(`/api/sessions/${id}/run`, { code });
const data = async (id: string) => (await api<{ data: Record<string, unknown> }>(`/api/sessions/${id}`)).data;

async function session(name: string, more: object = {}): Promise<string> {
  const id = newId(name);
  await api('/api/sessions', { language: 'python', session_id: id, ...more });
  return id;
}

/** Python that waits until `tell` is called. */
const waits = (id: string) => `import era_storage, time
while era_storage.kv.get('tests', '${id}') != 'go': time.sleep(0.02)\n`;
const tell = (id: string) => api(`/api/storage/kv/tests/${id}`, { value: 'go' }, 'PUT');

/** Hold back the calls of this method and path until what this gives is called; `asked` is there once there is one. */
async function hold(page: Page, method: string, path: RegExp): Promise<{ asked: Promise<unknown>; go: () => void }> {
  let go = () => {};
  const held = new Promise<void>((done) => {
    go = done;
  });
  await page.route(path, async (route) => {
    if (route.request().method() === method) await held;
    await route.continue();
  });
  const asked = page.waitForRequest((request) => request.method() === method && path.test(request.url()));
  return { asked, go };
}

test('a file that a run has rewritten isn’t replaced unasked by what was typed before', () =>
  withPage(async (page) => {
    const id = await session('files');
    await api(`/api/sessions/${id}/files/a.txt`, 'first\n', 'PUT');
    await api(`/api/sessions/${id}/files/b.txt`, 'other\n', 'PUT');
    await page.goto(part(id, 'files/a.txt'));
    await editor(page, 'Content of a.txt').fill('typed');
    await page.goto(part(id, 'files/b.txt'));
    await editor(page, 'Content of b.txt').getByText('other').waitFor();
    await run(id, 'open("a.txt", "w").write("by the run\\n")');
    await page.goto(part(id, 'files/a.txt'));
    await editor(page, 'Content of a.txt').getByText('typed').waitFor();
    await button(page, 'Save').click();
    await page.getByRole('dialog', { name: 'The file has changed meanwhile' }).waitFor();
    assert.equal(await file(id, 'a.txt'), 'by the run\n');
    await button(page, 'Replace it').click();
    await said(page, 'The file is saved.');
    assert.equal(await file(id, 'a.txt'), 'typed');
  }));

test('data that has changed isn’t replaced unasked by what was typed before', () =>
  withPage(async (page) => {
    const id = await session('data', { data: { n: 1 } });
    await page.goto(part(id, 'data'));
    await button(page, 'Edit').click();
    await editor(page, 'Data').fill('{"n": 2}');
    await page.goto(part(id, 'files'));
    await page.getByText('No files yet.').waitFor();
    const { version } = await api<{ version: number }>(`/api/sessions/${id}`);
    await api(`/api/sessions/${id}`, { data: { n: 3 } }, 'PATCH');
    // The page knows the newer version by now.
    await page.getByText(`v${version + 1}`, { exact: true }).waitFor();
    await page.goto(part(id, 'data'));
    await editor(page, 'Data').getByText('"n"').waitFor();
    await button(page, 'Save').click();
    await page.getByRole('dialog', { name: 'The data has changed meanwhile' }).waitFor();
    assert.equal((await data(id)).n, 3);
    await button(page, 'Replace it').click();
    await eventually(async () => (await data(id)).n === 2, 'it is replaced');
  }));

test('a save of data tells of what a run has left while it waited', () =>
  withPage(async (page) => {
    const id = await session('turn', { data: { n: 1 } });
    await page.goto(part(id, 'data'));
    await button(page, 'Edit').click();
    await editor(page, 'Data').fill('{"n": 2}');
    const state = `import json\njson.dump({"n": 3}, open(".session_data.json", "w"))`;
    await api(`/api/sessions/${id}/run`, { code: `${waits(id)}${state}`, background: true });
    const asked = page.waitForRequest((request) => request.method() === 'PATCH');
    await button(page, 'Save').click();
    await asked;
    await tell(id);
    await said(page, 'came while it was saved');
    assert.equal((await data(id)).n, 2);
  }));

test('stored code that has changed isn’t replaced unasked', () =>
  withPage(async (page) => {
    const id = await session('code');
    await api(`/api/sessions/${id}/code`, { code: 'print(1)' }, 'PUT');
    await page.goto(part(id, 'run'));
    await editor(page, 'Code').getByText('print(1)').waitFor();
    await editor(page, 'Code').fill('print(2)');
    await api(`/api/sessions/${id}/code`, { code: 'print(3)' }, 'PUT');
    await button(page, 'Store').click();
    await page.getByRole('dialog', { name: 'The code has changed meanwhile' }).waitFor();
    await button(page, 'Replace it').click();
    await said(page, 'The code is stored.');
    assert.equal((await api<{ code: string }>(`/api/sessions/${id}/code`)).code, 'print(2)');
    await button(page, 'Stored').waitFor();
  }));

test('what is typed while a save is under way stays, and is saved by the next', () =>
  withPage(async (page) => {
    const id = await session('meanwhile', { data: { n: 1 } });
    await api(`/api/sessions/${id}/files/a.txt`, 'first\n', 'PUT');
    await page.goto(part(id, 'files/a.txt'));
    const put = await hold(page, 'PUT', /\/files\/a\.txt$/);
    await editor(page, 'Content of a.txt').fill('second');
    await button(page, 'Save').click();
    await put.asked;
    await editor(page, 'Content of a.txt').fill('third');
    put.go();
    await said(page, 'The file is saved.');
    assert.equal(await file(id, 'a.txt'), 'second');
    await button(page, 'Save').click();
    await eventually(async () => (await file(id, 'a.txt')) === 'third', 'the rest is saved');

    await page.goto(part(id, 'data'));
    await button(page, 'Edit').click();
    await editor(page, 'Data').fill('{"n": 2}');
    const patch = await hold(page, 'PATCH', new RegExp(`/api/sessions/${id}$`));
    await button(page, 'Save').click();
    await patch.asked;
    await editor(page, 'Data').fill('{"n": 3}');
    patch.go();
    await said(page, 'The data is version');
    assert.equal((await data(id)).n, 2);
    await button(page, 'Save').click();
    await eventually(async () => (await data(id)).n === 3, 'the rest is saved');

    await page.goto(part(id, 'settings'));
    await page.unroute(new RegExp(`/api/sessions/${id}$`));
    const settings = await hold(page, 'PATCH', new RegExp(`/api/sessions/${id}$`));
    await page.getByLabel('Timeout of runs').fill('11');
    await button(page, 'Save').click();
    await settings.asked;
    await page.getByLabel('Labels').fill('{"team": "blue"}');
    await page.getByLabel('Processors').fill('1');
    settings.go();
    await said(page, 'The settings are saved.');
    assert.equal(await page.getByLabel('Timeout of runs').inputValue(), '11');
    assert.equal(await page.getByLabel('Processors').inputValue(), '1');
    await button(page, 'Save').click();
    await eventually(
      async () => (await api<{ metadata: { team?: string } }>(`/api/sessions/${id}`)).metadata.team === 'blue',
      'the rest is saved',
    );
  }));

test('a key pressed twice saves once, and takes its own save for nobody else’s', () =>
  withPage(async (page) => {
    const id = await session('twice');
    await api(`/api/sessions/${id}/files/a.txt`, 'first\n', 'PUT');
    await page.goto(part(id, 'files/a.txt'));
    const text = editor(page, 'Content of a.txt');
    await text.fill('typed');
    let saves = 0;
    page.on('request', (request) => {
      if (request.method() === 'PUT') saves += 1;
    });
    const held = await hold(page, 'PUT', /files\/a\.txt$/);
    await text.press('Control+s');
    await held.asked;
    await text.press('Control+s');
    held.go();
    await said(page, 'The file is saved.');
    assert.equal(saves, 1);
    assert.equal(await page.getByRole('dialog').count(), 0);
    assert.equal(await file(id, 'a.txt'), 'typed');
  }));

test('a switch can’t be turned back while it is saved (soak)', () =>
  withPage(async (page) => {
    const id = await session('switch');
    await page.goto(part(id, 'public'));
    const held = await hold(page, 'PATCH', new RegExp(`/api/sessions/${id}$`));
    const open = page.getByRole('checkbox', { name: 'Open' });
    await open.click();
    await held.asked;
    await eventually(() => open.isDisabled(), 'it waits');
    held.go();
    await eventually(() => open.isEnabled(), 'it is saved');
    await page.getByText('Calls are answered with 403.').waitFor();
    const isOpen = async () => (await api<{ allowPublicAccess: boolean }>(`/api/sessions/${id}`)).allowPublicAccess;
    assert.equal(await isOpen(), false);
    await open.click();
    await eventually(isOpen, 'it is open again');
  }));

test('a run goes on being shown when its tab is left', () =>
  withPage(async (page) => {
    const id = await session('left');
    await page.goto(part(id, 'run'));
    await editor(page, 'Code').fill(`print("before", flush=True)\n${waits(id)}print("after")`);
    await button(page, 'Run').click();
    const output = page.getByRole('region', { name: 'Output of the run' });
    await output.getByText('before').waitFor();
    await page.goto(part(id, 'files'));
    await page.getByText('No files yet.').waitFor();
    await page.goto(part(id, 'run'));
    await output.getByText('before').waitFor();
    await button(page, 'Stop').waitFor();
    await tell(id);
    await output.getByText('after').waitFor();
    await page.locator('.pane-head', { hasText: 'exit 0' }).waitFor();
  }));

test('a cell goes on when its tab is left, and takes nothing from those that were typed meanwhile (soak)', () =>
  withPage(async (page) => {
    const id = await session('cells');
    await page.goto(part(id, 'notebook'));
    await editor(page, 'Cell 1').fill(`print("before", flush=True)\n${waits(id)}print("after")`);
    await button(page, 'Run cell 1').click();
    const output = page.getByRole('region', { name: 'Output of cell 1' });
    await output.getByText('before').waitFor();
    await page.goto(part(id, 'files'));
    await page.getByText('No files yet.').waitFor();
    await page.goto(part(id, 'notebook'));
    await output.getByText('before').waitFor();
    await editor(page, 'Cell 2').fill('typed = 1');
    await tell(id);
    await output.getByText('after').waitFor();
    await page.locator('[aria-label="Run cell 1"][aria-busy=false]').waitFor();
    await editor(page, 'Cell 2').getByText('typed = 1').waitFor();
    await page.goto(part(id, 'files'));
    await page.getByText('No files yet.').waitFor();
    await page.goto(part(id, 'notebook'));
    await editor(page, 'Cell 2').getByText('typed = 1').waitFor();
    await page.route('**/stream', (route) =>
      route.fulfill({ contentType: 'text/event-stream', body: ': nothing\n\n' }),
    );
    await button(page, 'Run cell 2').click();
    await page.getByText('The stream ended before the run did.').waitFor();
  }));

test('ends of lines stay what they are (soak)', () =>
  withPage(async (page) => {
    const id = await session('ends');
    for (const [path, before, after] of [
      ['all.txt', 'a\r\nb\r\n', 'xa\r\nb\r\n'],
      ['some.txt', 'a\rb\r\nc\n', 'xa\rb\r\nc\n'],
    ] as const) {
      await api(`/api/sessions/${id}/files/${path}`, before, 'PUT');
      await page.goto(part(id, `files/${path}`));
      await editor(page, `Content of ${path}`).click();
      await page.keyboard.press('ControlOrMeta+Home');
      await page.keyboard.type('x');
      await button(page, 'Save').click();
      await said(page, 'The file is saved.');
      assert.equal(await file(id, path), after);
      await page.locator('.toast').waitFor({ state: 'detached' });
    }
  }));

test('numbers that JavaScript has no room for survive a new session and an edit of labels (soak)', () =>
  withPage(async (page) => {
    const id = newId('exact');
    await page.goto(`${SERVER}/#/new`);
    await page.getByLabel('Id', { exact: true }).fill(id);
    await page.locator('summary').click();
    await page.getByLabel('Data', { exact: true }).fill('{"large": 9007199254740993, "float": 1.0}');
    await button(page, 'Create session').click();
    await editor(page, 'Code').waitFor();
    const stored = async () => (await fetch(`${SERVER}/api/sessions/${id}`)).text();
    assert.match(await stored(), /"large": ?9007199254740993/);
    assert.match(await stored(), /"float": ?1\.0/);
    const headers = { 'Content-Type': 'application/json' };
    const body = '{"metadata": {"number": 12345678901234567890, "word": "owl"}}';
    await fetch(`${SERVER}/api/sessions/${id}`, { method: 'PATCH', headers, body });
    await page.goto(part(id, 'settings'));
    await page.reload();
    const labels = page.getByLabel('Labels');
    await eventually(async () => (await labels.inputValue()).includes('owl'), 'labels are shown');
    await labels.fill((await labels.inputValue()).replace('owl', 'hawk'));
    await button(page, 'Save').click();
    await eventually(async () => (await stored()).includes('hawk'), 'labels are saved');
    assert.match(await stored(), /"number": ?12345678901234567890/);
    await page.goto(part(id, 'data'));
    await button(page, 'Edit').click();
    await editor(page, 'Data').fill('');
    await button(page, 'Save').click();
    await eventually(async () => !('large' in (await data(id))), 'no data is left');
  }));

test('a search of files is left alone by runs, and an empty file can be edited (soak)', () =>
  withPage(async (page) => {
    const id = await session('search');
    await run(id, 'for n in range(20): open(f"file{n}.txt", "w").close()');
    await page.goto(part(id, 'files'));
    const search = page.getByLabel('Search files');
    await search.fill('file1');
    await run(id, 'open("file100.txt", "w").close()');
    await page.getByText('file100.txt').waitFor();
    await page.keyboard.type('n');
    assert.equal(await search.inputValue(), 'file1n');
    await page.goto(part(id, 'files/file3.txt'));
    await editor(page, 'Content of file3.txt').fill('no longer empty');
    await button(page, 'Save').click();
    await said(page, 'The file is saved.');
    assert.equal(await file(id, 'file3.txt'), 'no longer empty');
  }));

test('the code of runs is kept unless the new session or its settings say otherwise', () =>
  withPage(async (page) => {
    const id = newId('keeping');
    const kept = async () => {
      const { run_id } = await api<{ run_id: string }>(`/api/sessions/${id}/run`, { code: 'print(1)' });
      return (await api<{ code: string | null }>(`/api/sessions/${id}/runs/${run_id}`)).code;
    };
    await page.goto(`${SERVER}/#/new`);
    await page.getByLabel('Id', { exact: true }).fill(id);
    await page.getByText('More', { exact: true }).click();
    assert.ok(await page.getByLabel('Keep the code of runs').isChecked());
    await page.getByLabel('Keep the code of runs').uncheck();
    await button(page, 'Create session').click();
    await page.getByRole('heading', { name: id }).waitFor();
    assert.equal(await kept(), null);
    await page.goto(part(id, 'settings'));
    await page.getByLabel('Keep the code of runs').check();
    await button(page, 'Save').click();
    await said(page, 'The settings are saved.');
    assert.equal(await kept(), 'print(1)');
  }));
