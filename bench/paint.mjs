// A browser for paint.py: a line `new` makes a page that nothing is cached for; a line with a URL opens that and is answered
// when something of it can be seen. The first line that it writes is the URL of a page with nothing but a word.

import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const { chromium } = createRequire(new URL('../web/package.json', import.meta.url))('playwright-core');

const floor = createServer((_, answer) => answer.setHeader('Content-Type', 'text/html').end('<!doctype html>word'));
await new Promise((done) => floor.listen(0, '127.0.0.1', done));
const args = ['--no-sandbox', '--disable-dev-shm-usage'];
const browser = await chromium.launch({ executablePath: process.argv[2], args });
console.log(`http://127.0.0.1:${floor.address().port}/`);

let context;
let page;
for await (const line of createInterface({ input: process.stdin })) {
  if (line === 'new') {
    await context?.close();
    context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
    page = await context.newPage();
  } else {
    await page.goto(line, { waitUntil: 'commit' });
    await page.waitForFunction(() => performance.getEntriesByName('first-contentful-paint').length > 0);
  }
  console.log('done');
}
await browser.close();
process.exit(0);
