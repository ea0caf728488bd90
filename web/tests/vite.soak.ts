/** A development server in a live session, at its public URL. Its packages come from npm's registry. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { api, eventually, newId, withPage } from './harness.ts';

test('Vite replaces a module while its page stays', () =>
  withPage(async (page) => {
    const id = newId('vite');
    const session = `/api/sessions/${id}`;
    const put = (path: string, content: string) => api(`${session}/files/${path}`, content, 'PUT');
    const shows = (text: string) => put('shown.js', `export const shown = ${JSON.stringify(text)};`);

    await api('/api/sessions', { language: 'node', session_id: id, default_timeout: 300, setup: { npm: ['vite'] } });
    await put('index.html', '<!doctype html><p id="shown"></p><script type="module" src="/main.js"></script>');
    await put(
      'main.js',
      `import { shown } from './shown.js';
       const show = (text) => { document.querySelector('#shown').textContent = text; };
       show(shown);
       import.meta.hot.accept('./shown.js', (module) => show(module.shown));`,
    );
    await shows('the first');
    await api(`${session}/processes`, { command: 'vite --port 5173 --host 127.0.0.1', tag: 'vite' }); // after the setup

    const { site_url: site } = await api<{ site_url: string }>(`${session}/host?port=5173`);
    await eventually(async () => (await page.goto(`${site}/`))?.ok() ?? false, 'nothing serves');
    await page.getByText('the first', { exact: true }).waitFor();
    await page.evaluate('window.hasStayed = true');
    await shows('the second');
    await page.getByText('the second', { exact: true }).waitFor();
    assert.equal(await page.evaluate('window.hasStayed'), true);
    await api(session, undefined, 'DELETE');
  }));
