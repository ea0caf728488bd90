/** axe-core on every page, in both colours; and widths from a phone's to a desk's: all of it in one round. `make test`
 * does that for a third of the pages, each made of other parts, and `make soak` for the rest. */

import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { after, before, test } from 'node:test';
import type { Page } from 'playwright-core';
import { api, eventually, newId, SERVER, withPage } from './harness.ts';

const AXE = new URL('../node_modules/axe-core/axe.min.js', import.meta.url);
const id = newId('seen');
let webhook = '';

before(async () => {
  await api('/api/sessions', { language: 'python', session_id: id, data: { n: 1 }, metadata: { team: 'blue' } });
  await api(`/api/sessions/${id}/code`, { code: 'print("hello")' }, 'PUT');
  await api(`/api/sessions/${id}/files/table.csv`, 'a,b\n1,2\n', 'PUT');
  await api(`/api/sessions/${id}/files/notes/read.md`, '# Notes\n', 'PUT');
  await api(`/api/sessions/${id}/run`, { code: 'print("\\x1b[32mgreen\\x1b[0m"); open("x.txt", "w").write("1")' });
  await api(`/api/sessions/${id}/inbox`, { retries: 0 }, 'PUT');
  await api(`/proxy/${id}/inbox/orders`, '{"order": 1}', 'POST');
  await api('/api/storage/kv/seen/price', { value: '12' }, 'PUT');
  await api(`/api/storage/kv/seen/${'long'.repeat(30)}`, { value: '1' }, 'PUT');
  webhook = (await api<{ id: string }>('/api/webhooks', { url: 'http://203.0.113.7/era' })).id;
});

after(() => api(`/api/webhooks/${webhook}`, undefined, 'DELETE'));

type Place = [path: string, sign: string];

const SOME: Place[] = [
  ['', '.row'],
  [`sessions/${id}`, '.editor[data-ready=true]'],
  [`sessions/${id}/files/table.csv`, 'table'],
  [`sessions/${id}/versions`, '.changes, h3'],
  [`sessions/${id}/inbox`, '.timeline a'],
  [`sessions/${id}/settings`, 'form'],
  ['server', '.page:has(.plot canvas) .limits'],
];

const OTHERS: Place[] = [
  ['new', '.choice'],
  [`sessions/${id}/data`, '.json'],
  [`sessions/${id}/files/notes%2Fread.md`, '.editor[data-ready=true]'],
  [`sessions/${id}/runs`, '.output'],
  [`sessions/${id}/notebook`, '.editor[data-ready=true]'],
  [`sessions/${id}/processes`, '.empty'],
  [`sessions/${id}/terminal`, '.pane-empty'],
  [`sessions/${id}/setup`, '.empty'],
  [`sessions/${id}/public`, '.url-line'],
  ['storage/kv/seen/price', '.facts'],
  ['usage', '.meters'],
  ['webhooks', '.timeline a'],
  ['keys', '.empty, table, .problem'],
  ['audit', 'table'],
];

const WIDTHS = [360, 390, 768, 1600];
const DESK = { width: 1280, height: 800 };
type Colors = 'light' | 'dark';

/** What is serious, by axe; in dark colours of contrasts only, since all else is the same. */
async function findings(page: Page, colors: Colors): Promise<string[]> {
  if (!(await page.evaluate(() => 'axe' in window))) await page.evaluate(await readFile(AXE, 'utf8'));
  const found = await page.evaluate(
    async (only) => {
      const options = { resultTypes: ['violations'], ...(only && { runOnly: { type: 'rule', values: only } }) };
      // biome-ignore lint/suspicious/noExplicitAny: axe has put itself there
      const result = await (window as any).axe.run(document, options);
      return result.violations
        .filter((each: { impact: string }) => each.impact === 'serious' || each.impact === 'critical')
        .map(
          (each: { id: string; nodes: { html: string; failureSummary: string }[] }) =>
            `${each.id}: ${each.nodes[0]?.html} ${each.nodes[0]?.failureSummary}`,
        );
    },
    colors === 'dark' ? ['color-contrast'] : undefined,
  );
  return found.map((each: string) => `${page.url()} (${colors}): ${each}`);
}

async function turn(page: Page, colors: Colors): Promise<void> {
  await page.emulateMedia({ colorScheme: colors });
  await eventually(
    async () => (await page.evaluate(() => document.documentElement.dataset.theme)) === colors,
    `it is ${colors}`,
  );
}

/** By how many pixels the page is wider than its window. */
function excess(page: Page): Promise<number> {
  return page.evaluate(() =>
    Math.max(
      document.documentElement.scrollWidth - innerWidth,
      ...['#main', '.page', '.tab-body', '.side'].map((name) => {
        const element = document.querySelector(name);
        return element ? element.scrollWidth - element.clientWidth : 0;
      }),
    ),
  );
}

/** What stands beside names that may be long, and is broken into several lines by them: times, labels, states. */
function squeezed(page: Page): Promise<string[]> {
  return page.evaluate(() =>
    [
      ...document.querySelectorAll<HTMLElement>(
        'time, .status, .label, .timeline a > .push ~ .soft > bdi, td.number, th',
      ),
    ]
      .filter((each) => {
        const range = document.createRange();
        range.selectNodeContents(each);
        return range.getBoundingClientRect().height > 2 * Number.parseFloat(getComputedStyle(each).fontSize);
      })
      .map((each) => `${each.className || each.tagName}: ${each.textContent}`),
  );
}

/** Axe finds nothing serious on any of these pages, light or dark, and none is wider than its window. */
const areAccessible = (places: Place[]) => () =>
  withPage(
    async (page, complaints) => {
      const found: string[] = [];
      for (const [path, sign] of places) {
        await page.goto(`${SERVER}/#/${path}`);
        await page.locator(sign).first().waitFor();
        found.push(...(await findings(page, 'light')));
        await turn(page, 'dark');
        found.push(...(await findings(page, 'dark')));
        await turn(page, 'light');
        for (const width of WIDTHS) {
          await page.setViewportSize({ ...DESK, width });
          await eventually(async () => (await excess(page)) <= 0, `${path} fits into ${width} pixels`);
          found.push(
            ...(await squeezed(page)).map((each) => `${path} at ${width} pixels: ${each} is in several lines`),
          );
        }
        await page.setViewportSize(DESK);
      }
      await page.keyboard.press('?');
      await page.getByRole('dialog', { name: 'Keys' }).waitFor();
      for (const colors of ['light', 'dark'] as const) {
        await turn(page, colors);
        found.push(...(await findings(page, colors)));
      }
      await page.keyboard.press('Escape');
      await page.keyboard.press('Control+k');
      await page.getByRole('combobox', { name: 'Find a command or a session' }).waitFor();
      for (const colors of ['dark', 'light'] as const) {
        await turn(page, colors);
        found.push(...(await findings(page, colors)));
      }
      assert.deepEqual(found, []);
      assert.deepEqual(
        complaints.filter((each) => !/40[349]/.test(each)),
        [],
      );
    },
    { colorScheme: 'light', reducedMotion: 'reduce' },
  );

test('some pages, and the dialogs above them, are accessible', areAccessible(SOME));
test('all others are accessible (soak)', areAccessible(OTHERS));
