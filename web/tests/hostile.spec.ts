/** What programs write is never more than text, and pages of theirs reach nothing. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { Page } from 'playwright-core';
import { api, newId, SERVER, withPage } from './harness.ts';

const SCRIPT = '<img src=x onerror="document.title=\'pwned\'"><script>document.title="pwned"</script>';
const RTL = 'safe\u202egpj.exe';

type Session = { version: number };

/** Nothing was run, and nothing of it became an element. */
async function inert(page: Page): Promise<void> {
  assert.doesNotMatch(await page.title(), /pwned/);
  assert.equal(await page.locator('#app img[src="x"], #app script').count(), 0);
}

async function session(name: string, more: object = {}): Promise<string> {
  const id = newId(name);
  await api('/api/sessions', { language: 'python', session_id: id, ...more });
  return id;
}

test('markup in data, labels, names, code and output is text', () =>
  withPage(async (page, complaints) => {
    const id = await session('markup', {
      data: { [SCRIPT]: SCRIPT, list: [SCRIPT], __proto__: 1 },
      metadata: { [SCRIPT]: SCRIPT, team: SCRIPT },
    });
    await api(
      `/api/sessions/${id}/code`,
      { code: `# ${SCRIPT}\nprint(${JSON.stringify(SCRIPT)})`, description: SCRIPT },
      'PUT',
    );
    await api(`/api/sessions/${id}/files/${encodeURIComponent(`${SCRIPT.replaceAll('/', '')}.txt`)}`, SCRIPT, 'PUT');
    await api(`/api/sessions/${id}/files/t.csv`, `${SCRIPT},b\n${SCRIPT},2\n`, 'PUT');
    await api(`/api/sessions/${id}/files/p.html`, `<h1>shown</h1>${SCRIPT}`, 'PUT');
    await api(
      `/api/sessions/${id}/files/p.svg`,
      `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><script>parent.document.title="pwned"</script></svg>`,
      'PUT',
    );
    await page.goto(SERVER);
    await page.getByRole('option', { name: id }).waitFor();
    await inert(page);
    for (const [part, sign] of [
      ['run', '.editor[data-ready=true]'],
      ['data', '.json'],
      ['files', '.file-tree'],
      ['files/t.csv', 'td'],
      ['files/p.svg', '.picture'],
      ['versions', '.timeline'],
      ['settings', 'form'],
    ]) {
      await page.goto(`${SERVER}/#/sessions/${id}/${part}`);
      await page
        .locator(sign ?? '')
        .first()
        .waitFor();
      await inert(page);
    }
    await page.goto(`${SERVER}/#/sessions/${id}/run`);
    await page.getByRole('button', { name: 'Run', exact: true }).click();
    await page.locator('.output', { hasText: '<script>' }).waitFor();
    await inert(page);
    assert.deepEqual(complaints, []);
    // In a frame it is a page, but one that can't run anything.
    await page.goto(`${SERVER}/#/sessions/${id}/files/p.html`);
    await page.frameLocator('iframe').getByRole('heading', { name: 'shown' }).waitFor();
    assert.doesNotMatch(await page.title(), /pwned/);
  }));

test('the code and the command of a run are text in its record and in the list', () =>
  withPage(async (page, complaints) => {
    const id = await session('records', { allowPublicAccess: false });
    const code = `# ${SCRIPT} safe\u202egpj.exe \x1b]0;pwned\x07\n${`x = "${SCRIPT}"\n`.repeat(2000)}`;
    const run = (body: object) => api<{ run_id: string }>(`/api/sessions/${id}/run`, body);
    const cut = await run({ code, args: [SCRIPT] });
    const command = await run({ command: ['echo', SCRIPT] });
    const line = await run({ command: `echo '${SCRIPT}'` });
    const left = await run({ code: 'print(1)', record_code: false });
    const row = (of: { run_id: string }) => page.getByRole('list', { name: 'Runs' }).locator(`a[href$="${of.run_id}"]`);
    const open = async (of: { run_id: string }) => {
      await page.goto(`${SERVER}/#/sessions/${id}/runs/${of.run_id}`);
      await page.getByRole('heading', { name: of.run_id }).waitFor();
    };
    await open(cut);
    const content = page.getByRole('textbox', { name: 'Code of the run' });
    await content.getByText('<script>').first().waitFor();
    await row(cut).getByText('# <img src=x').waitFor();
    assert.match((await row(cut).textContent()) ?? '', /safe⟨202e⟩gpj\.exe/);
    await page.getByText('Only the beginning was kept.').waitFor();
    assert.equal(await content.getAttribute('aria-readonly'), 'true');
    await inert(page);
    assert.equal(await content.locator('img[src], script').count(), 0);
    const shown = (await content.textContent()) ?? '';
    for (const hidden of ['\u202e', '\u001b', '\u0007']) assert.ok(!shown.includes(hidden));
    await open(command);
    const words = page.getByRole('textbox', { name: 'Command of the run' });
    await words.getByText('echo').waitFor();
    assert.match((await words.textContent()) ?? '', /^echo '<img src=x onerror=.*<\/script>'$/);
    await row(command).getByText('$ echo').waitFor();
    await inert(page);
    await open(line);
    await words.getByText('echo').waitFor();
    await inert(page);
    assert.equal(await page.getByText('Only the beginning was kept.').count(), 0);
    await open(left);
    await page.getByText('The record doesn’t keep the code of this run.').waitFor();
    await row(left).getByText('code not kept').waitFor();
    assert.deepEqual(complaints, []);
  }));

test('of terminal sequences only colours count, and text keeps to its line', () =>
  withPage(async (page) => {
    const id = await session('terminal');
    const code = `import sys, time
w = sys.stdout.write
w("\\x1b]0;pwned\\x07\\x1b]8;;javascript:alert(1)\\x07link\\x1b]8;;\\x07\\n")
w("\\x1b[2J\\x1b[Hnot cleared\\n")
w("\\x1b[31mred\\x1b[0m \\x1b[38;2;300;0;0mexact\\x1b[0m \\x1b[38;5;999mindexed\\x1b[0m\\n")
w("10%\\r100%\\n")
w("a\\u202eb\\u2066c\\n")
w("\\x1b[" + "1;" * 5000)
sys.stdout.flush()
time.sleep(0.3) # so that it comes in two pieces, the first longer than what is held back
w("mlong\\n")
w("end\\n")`;
    await page.goto(`${SERVER}/#/sessions/${id}/run`);
    await page.getByRole('textbox', { name: 'Code' }).waitFor();
    await api(`/api/sessions/${id}/code`, { code }, 'PUT');
    await page.reload();
    await page.locator('.cm-content', { hasText: 'import sys' }).waitFor();
    await page.getByRole('button', { name: 'Run', exact: true }).click();
    const output = page.getByRole('region', { name: 'Output of the run' });
    await output.getByText('end').waitFor();
    const text = (await output.locator('.output-line').allTextContents()).join('');
    assert.match(text, /^link$/m);
    assert.match(text, /^not cleared$/m);
    assert.match(text, /^100%$/m);
    assert.doesNotMatch(text, /10%1|javascript|pwned/);
    assert.ok(!text.includes('\u001b'));
    assert.equal(await output.locator('a').count(), 0);
    const red = await output.getByText('red', { exact: true }).evaluate((element) => getComputedStyle(element).color);
    const plain = await output.getByText('not cleared').evaluate((element) => getComputedStyle(element).color);
    assert.notEqual(red, plain);
    const isolated = await output
      .locator('.output-line')
      .first()
      .evaluate((line) => getComputedStyle(line).unicodeBidi);
    assert.match(isolated, /isolate|plaintext/);
    assert.match(await page.title(), new RegExp(id));
  }));

test('names show what is hidden in them', () =>
  withPage(async (page) => {
    const id = await session('names');
    await api(`/api/sessions/${id}/files/${encodeURIComponent(RTL)}`, 'x', 'PUT');
    await page.goto(`${SERVER}/#/sessions/${id}/files`);
    await page.locator('.file-tree', { hasText: 'safe⟨202e⟩gpj.exe' }).waitFor();
  }));

test('ten megabytes on one line, and a hundred thousand lines, leave the page usable', () =>
  withPage(async (page) => {
    const id = await session('long');
    await api(
      `/api/sessions/${id}/code`,
      { code: 'print("x" * 10_000_000)\nfor n in range(100_000):\n    print(n)\nprint("the end")' },
      'PUT',
    );
    await page.goto(`${SERVER}/#/sessions/${id}/run`);
    await page.locator('.cm-content', { hasText: 'the end' }).waitFor();
    await page.getByRole('button', { name: 'Run', exact: true }).click();
    await page.locator('.pane-head', { hasText: 'exit 0' }).waitFor();
    await page.locator('.output-notice', { hasText: 'characters aren’t shown' }).waitFor();
    const shown = await page
      .locator('.output')
      .first()
      .evaluate((element) => element.textContent?.length ?? 0);
    assert.ok(shown < 1_000_000, String(shown));
    await page.getByRole('link', { name: 'Data', exact: true }).click();
    await page.getByRole('heading', { name: 'Now' }).waitFor();
  }));

test('a page that a session serves reaches neither the dashboard nor the API', () =>
  withPage(async (page) => {
    const id = await session('attacker');
    const victim = await session('victim');
    const attack = `
      const found = {};
      const tried = async (name, act) => { try { found[name] = String(await act()); } catch (error) { found[name] = 'refused'; } };
      (async () => {
        await tried('call', async () => (await fetch('${SERVER}/api/sessions/${victim}/stop-it', { method: 'DELETE', referrerPolicy: 'no-referrer' })).status);
        await tried('read', async () => (await fetch('${SERVER}/api/sessions', { referrerPolicy: 'no-referrer' })).text());
        await tried('storage', () => { sessionStorage.setItem('x', '1'); return 'written'; });
        await tried('key', () => parent.sessionStorage.getItem('era-key'));
        await tried('parent', () => { if (parent === self) return ''; parent.document.title = 'pwned'; return 'changed'; });
        await tried('opener', () => { const other = open('${SERVER}/#/sessions/${victim}/settings'); other.document.title = 'pwned'; return 'changed'; });
        await tried('frame', () => new Promise((done, failed) => {
          const frame = document.createElement('iframe');
          frame.src = '${SERVER}/';
          frame.onload = () => { try { done(frame.contentDocument.title); } catch { failed(); } };
          document.body.append(frame);
          setTimeout(failed, 3000);
        }));
        document.body.dataset.found = JSON.stringify(found);
      })();`;
    const html = `<!doctype html><body><script>${attack}</script></body>`;
    await api(
      `/api/sessions/${id}/code`,
      { code: `import json\nprint(json.dumps({"contentType": "text/html", "body": ${JSON.stringify(html)}}))` },
      'PUT',
    );
    const outcomes = async (body: ReturnType<Page['locator']>) => {
      await body.waitFor({ state: 'attached' });
      return JSON.parse((await body.getAttribute('data-found')) ?? '{}') as { [name: string]: string };
    };
    const check = async (found: { [name: string]: string }, ...own: string[]) => {
      assert.ok(Object.keys(found).length >= 7, JSON.stringify(found));
      for (const name of own) delete found[name];
      const allowed = ['refused', 'null', '403', 'undefined', ''];
      for (const [name, outcome] of Object.entries(found)) assert.ok(allowed.includes(outcome), `${name}: ${outcome}`);
      assert.ok((await api<Session>(`/api/sessions/${victim}`)).version);
    };
    // By itself, and in the dashboard's own preview.
    await page.goto(`${SERVER}/proxy/${id}/3000/`);
    await check(await outcomes(page.locator('body[data-found]')));
    await page.goto(`${SERVER}/#/sessions/${id}/public`);
    await page.getByRole('button', { name: 'Preview' }).click();
    await check(await outcomes(page.frameLocator('iframe').locator('body[data-found]')), 'storage'); // of its own site
    assert.doesNotMatch(await page.title(), /pwned/);
    // Without the policy that gives such pages an origin of their own, the same attack succeeds.
    await page.route('**/proxy/**', async (route) => {
      const response = await route.fetch();
      const headers = { ...response.headers() };
      delete headers['content-security-policy'];
      await route.fulfill({ response, headers });
    });
    await page.goto(`${SERVER}/proxy/${id}/3000/`);
    const found = await outcomes(page.locator('body[data-found]'));
    assert.match(found.read ?? '', new RegExp(victim));
    assert.equal(found.storage, 'written');
  }));

test('output that is hard to search or has no end of empty lines is shown soon', () =>
  withPage(async (page) => {
    const id = await session('heavy');
    const code = 'import sys\nsys.stdout.write("\\x1b[" + "!" * 120_000 + "\\n" + "\\r" * 120_000 + "shown\\n")';
    const { run_id } = await api<{ run_id: string }>(`/api/sessions/${id}/run`, { code });
    await page.goto(`${SERVER}/#/sessions/${id}/runs/${run_id}`);
    await page.locator('.output').getByText('shown', { exact: true }).waitFor({ timeout: 60_000 });
    const command = "yes '' | head -n 2000000; echo its end; exec sleep 600";
    const { process_id } = await api<{ process_id: string }>(`/api/sessions/${id}/processes`, { command });
    await page.goto(`${SERVER}/#/sessions/${id}/processes/${process_id}`);
    await page.locator('.output').getByText('its end').waitFor();
    assert.ok((await page.locator('.output-line').count()) <= 20_001);
    await api(`/api/sessions/${id}`, undefined, 'DELETE');
  }));
