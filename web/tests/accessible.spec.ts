/** axe-core on every page, in both colours; and widths from a phone's to a desk's. */

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { before, test } from 'node:test';
import type { Page } from 'playwright-core';
import { api, eventually, newId, SERVER, withPage } from './harness.ts';

const AXE = new URL('../node_modules/axe-core/axe.min.js', import.meta.url);
const id = newId('seen');

before(async () => {
  await api('/api/sessions', { language: 'python', session_id: id, data: { n: 1 }, metadata: { team: 'blue' } });
  await api(`/api/sessions/${id}/code`, { code: 'print("hello")' }, 'PUT');
  await api(`/api/sessions/${id}/files/table.csv`, 'a,b\n1,2\n', 'PUT');
  await api(`/api/sessions/${id}/files/notes/read.md`, '# Notes\n', 'PUT');
  await api(`/api/sessions/${id}/run`, { code: 'print("\\x1b[32mgreen\\x1b[0m"); open("x.txt", "w").write("1")' });
  await api(`/api/sessions/${id}/inbox`, { retries: 0 }, 'PUT');
  await api(`/proxy/${id}/inbox/orders`, '{"order": 1}', 'POST');
  await api('/api/storage/kv/seen/price', { value: '12' }, 'PUT');
});

const PLACES: [path: string, sign: string][] = [
  ['', '.row'],
  ['new', '.choice'],
  [`sessions/${id}`, '.editor[data-ready=true]'],
  [`sessions/${id}/data`, '.json'],
  [`sessions/${id}/files/table.csv`, 'table'],
  [`sessions/${id}/files/notes%2Fread.md`, '.editor[data-ready=true]'],
  [`sessions/${id}/versions`, '.changes, h3'],
  [`sessions/${id}/runs`, '.output'],
  [`sessions/${id}/notebook`, '.editor[data-ready=true]'],
  [`sessions/${id}/processes`, '.empty'],
  [`sessions/${id}/terminal`, '.pane-empty'],
  [`sessions/${id}/setup`, '.empty'],
  [`sessions/${id}/inbox`, '.timeline a'],
  [`sessions/${id}/public`, '.url-line'],
  [`sessions/${id}/settings`, 'form'],
  ['server', '.plot canvas'],
  ['storage/kv/seen/price', '.facts'],
  ['keys', '.empty, table, .problem'],
  ['audit', 'table'],
];

async function findings(page: Page, rules?: string[]): Promise<string[]> {
  await page.evaluate(await readFile(AXE, 'utf8'));
  return page.evaluate(async (only) => {
    const options = { resultTypes: ['violations'], ...(only && { runOnly: { type: 'rule', values: only } }) };
    // biome-ignore lint/suspicious/noExplicitAny: axe has put itself there
    const result = await (window as any).axe.run(document, options);
    return result.violations
      .filter((each: { impact: string }) => each.impact === 'serious' || each.impact === 'critical')
      .map(
        (each: { id: string; nodes: { html: string; failureSummary: string }[] }) =>
          `${each.id}: ${each.nodes[0]?.html} ${each.nodes[0]?.failureSummary}`,
      );
  }, rules);
}

for (const [colorScheme, rules] of [
  ['light', undefined],
  ['dark', ['color-contrast']], // all else is the same
] as const) {
  test(`axe finds nothing serious (${colorScheme})`, () =>
    withPage(
      async (page, complaints) => {
        const found: string[] = [];
        for (const [path, sign] of PLACES) {
          await page.goto(`${SERVER}/#/${path}`);
          await page.locator(sign).first().waitFor();
          found.push(...(await findings(page, rules && [...rules])).map((each) => `${path}: ${each}`));
        }
        await page.keyboard.press('?');
        found.push(...(await findings(page, rules && [...rules])));
        await page.keyboard.press('Escape');
        await page.keyboard.press('Control+k');
        await page.getByRole('combobox', { name: 'Find a command or a session' }).waitFor();
        found.push(...(await findings(page, rules && [...rules])));
        assert.deepEqual(found, []);
        assert.deepEqual(
          complaints.filter((each) => !/40[49]/.test(each)),
          [],
        );
      },
      { colorScheme },
    ));
}

test('no page is wider than its window', () =>
  withPage(async (page) => {
    const tooWide = () =>
      page.evaluate(() =>
        Math.max(
          document.documentElement.scrollWidth - innerWidth,
          ...['#main', '.page', '.tab-body'].map((name) => {
            const element = document.querySelector(name);
            return element ? element.scrollWidth - element.clientWidth : 0;
          }),
        ),
      );
    for (const [path, sign] of PLACES) {
      await page.goto(`${SERVER}/#/${path}`);
      await page.locator(sign).first().waitFor();
      for (const width of [360, 390, 768, 1600]) {
        await page.setViewportSize({ width, height: 800 });
        await eventually(async () => (await tooWide()) <= 0, `${path} fits into ${width} pixels`);
      }
    }
  }));
