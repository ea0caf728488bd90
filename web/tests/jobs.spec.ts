/** The ten jobs of a user's day, each by mouse and by keyboard only: by keyboard, `make test` does the first three. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Page } from 'playwright-core';
import { api, eventually, keyboardUser, mouseUser, newId, SERVER, type User, withPage } from './harness.ts';

const COUNTING = `import json
with open(".session_data.json") as f:
    data = json.load(f)
data["count"] = data.get("count", 0) + 1
with open(".session_data.json", "w") as f:
    json.dump(data, f)
with open("out.txt", "w") as f:
    f.write("first\\n")
print("Count:", data["count"])`;

type Session = { version: number; data: { count?: number; word?: string }; language: string; status: string };

const button = (page: Page, name: string) => page.getByRole('button', { name, exact: true });
const inDialog = (page: Page, name: string) => page.getByRole('dialog').getByRole('button', { name, exact: true });
const tab = (page: Page, name: string) =>
  page.getByRole('navigation', { name: 'Parts of the session' }).getByText(name, { exact: true });
const tabLink = (page: Page, name: string) =>
  page.getByRole('navigation', { name: 'Parts of the session' }).getByRole('link', { name, exact: true });
const said = (page: Page, text: string) => page.locator('.toast', { hasText: text }).first().waitFor();

async function day(page: Page, user: User, jobs: 3 | 10): Promise<void> {
  const id = newId('day');

  // 1. Create a session.
  await page.goto(SERVER);
  await user.press(page.locator('.page-head').getByRole('button', { name: 'New session' }));
  await user.type(page.getByLabel('Id', { exact: true }), id);
  await user.press(button(page, 'Create session'));
  await page.getByRole('heading', { name: id }).waitFor();
  assert.equal((await api<Session>(`/api/sessions/${id}`)).language, 'python');

  // 2. Write code and run it.
  await page.getByRole('textbox', { name: 'Code' }).waitFor();
  await user.type(page.getByRole('textbox', { name: 'Code' }), COUNTING);
  await user.press(button(page, 'Run'));
  await page.locator('.output', { hasText: 'Count: 1' }).waitFor();

  // 3. Store it, and run it again: the session remembers.
  await user.press(button(page, 'Store'));
  await said(page, 'The code is stored.');
  await user.press(button(page, 'Run'));
  await page.locator('.output', { hasText: 'Count: 2' }).waitFor();
  await page.getByText('is in force.').waitFor();

  if (jobs === 3) return;

  // 4. Look at the data, and change it.
  await user.press(tabLink(page, 'Data'));
  await page.locator('.json-row', { hasText: 'count' }).waitFor();
  await user.press(button(page, 'Edit'));
  await user.type(page.getByRole('textbox', { name: 'Data' }), '{"count": 40, "word": "owl"}');
  await user.press(button(page, 'Save'));
  await said(page, 'The data is version');
  await page.locator('.json', { hasText: '"owl"' }).waitFor();
  assert.deepEqual((await api<Session>(`/api/sessions/${id}`)).data.word, 'owl');

  // 5. Upload a file, change it, and see it.
  await user.press(tabLink(page, 'Files'));
  const choosing = page.waitForEvent('filechooser');
  await user.press(button(page, 'Upload'));
  await (await choosing).setFiles({ name: 'in.txt', mimeType: 'text/plain', buffer: Buffer.from('pears\n') });
  await page.getByRole('heading', { name: 'in.txt' }).waitFor();
  await user.type(page.getByRole('textbox', { name: 'Content of in.txt' }), 'plums\n');
  await user.press(button(page, 'Save'));
  await said(page, 'The file is saved.');
  assert.equal(await (await fetch(`${SERVER}/api/sessions/${id}/files/in.txt`)).text(), 'plums\n');

  // 6. See what a version changed, name it, and go back to it.
  await user.press(tabLink(page, 'Versions'));
  await user.press(page.getByRole('list', { name: 'Versions' }).getByRole('link', { name: /^v2\b/ }));
  await page.getByRole('heading', { name: 'Version 2' }).waitFor();
  await page.getByText('/count').waitFor();
  await user.press(button(page, 'Name'));
  await user.type(page.getByRole('dialog').getByLabel('Name'), 'first count');
  await user.press(inDialog(page, 'Name it'));
  await page.getByText('first count').waitFor();
  await user.press(button(page, 'Roll back'));
  await user.press(inDialog(page, 'Roll back'));
  await said(page, 'Data and files are those of version 2.');
  assert.equal((await api<Session>(`/api/sessions/${id}`)).data.count, 1);

  // 7. Fork it.
  await user.press(button(page, 'Fork'));
  await user.type(page.getByRole('dialog').getByLabel('Id'), `${id}-fork`);
  await user.press(inDialog(page, 'Copy'));
  await page.getByRole('heading', { name: `${id}-fork` }).waitFor();
  assert.equal((await api<Session>(`/api/sessions/${id}-fork`)).data.count, 1);

  // 8. Stop a run that lasts, and read its record.
  await page.getByRole('textbox', { name: 'Code' }).waitFor();
  await user.type(
    page.getByRole('textbox', { name: 'Code' }),
    'import time\nprint("waiting", flush=True)\ntime.sleep(600)',
  );
  await user.press(button(page, 'Run'));
  await page.locator('.output', { hasText: 'waiting' }).waitFor();
  await user.press(button(page, 'Stop'));
  await page.locator('.pane-head', { hasText: 'killed' }).waitFor();
  await user.press(page.getByRole('link', { name: 'Record' }));
  await page.getByText('Peak memory').waitFor();
  await page.locator('.output', { hasText: 'waiting' }).waitFor();

  // 9. Open an inbox, deliver something, and run it again.
  await user.press(tabLink(page, 'Inbox'));
  await user.press(button(page, 'Open an inbox'));
  await user.press(inDialog(page, 'Save'));
  await page.getByRole('heading', { name: 'Deliveries' }).waitFor();
  await api(`/proxy/${id}-fork/inbox/orders`, '{"order": 1}', 'POST');
  await page.getByRole('list', { name: 'Deliveries' }).getByText('/orders').waitFor();
  await page.locator('.section-head', { hasText: 'POST /orders' }).getByText('done').waitFor();
  await user.press(button(page, 'Replay'));
  await eventually(async () => (await api<Session>(`/api/sessions/${id}-fork`)).data.count === 3, 'it was run twice');

  // 10. Delete it.
  await user.press(tabLink(page, 'Settings'));
  await user.press(button(page, 'Delete'));
  await user.press(inDialog(page, 'Delete the session'));
  await page.getByRole('heading', { name: 'Sessions', exact: true }).waitFor();
  assert.equal((await fetch(`${SERVER}/api/sessions/${id}-fork`)).status, 404);
  await tab(page, 'Code').waitFor({ state: 'detached' });
}

const spend = (user: (page: Page) => User, jobs: 3 | 10) => () =>
  withPage(async (page, complaints) => {
    await day(page, user(page), jobs);
    assert.deepEqual(
      complaints.filter((each) => !each.includes('404')),
      [],
    );
  });

test('a day by mouse', spend(mouseUser, 10));
test('the first three jobs by keyboard', spend(keyboardUser, 3));
test('a day by keyboard (soak)', spend(keyboardUser, 10)); // each of its steps takes many presses of Tab

test('the palette finds sessions and commands, and keys work', () =>
  withPage(async (page) => {
    const id = newId('palette');
    await api('/api/sessions', { language: 'node', session_id: id });
    await page.goto(SERVER);
    await page.getByRole('option', { name: id }).waitFor();
    await page.keyboard.press('Control+k');
    await page.getByRole('combobox', { name: 'Find a command or a session' }).waitFor();
    await page.keyboard.insertText(id);
    await page.keyboard.press('Enter');
    await page.getByRole('heading', { name: id }).waitFor();
    await page.keyboard.press('4');
    await page.getByRole('heading', { name: 'Version 1' }).waitFor();
    await page.keyboard.press('?');
    await page.getByRole('dialog', { name: 'Keys' }).getByText('New session').waitFor();
    await page.keyboard.press('Escape');
    await page.keyboard.press('g');
    await page.keyboard.press('v');
    await page.getByRole('heading', { name: 'Server' }).waitFor();
    await page.keyboard.press('Control+k');
    await page.getByRole('combobox', { name: 'Find a command or a session' }).waitFor();
    await page.keyboard.insertText('dark');
    await page.keyboard.press('Enter');
    await eventually(() => page.evaluate(() => document.documentElement.dataset.theme === 'dark'), 'it is dark');
  }));
