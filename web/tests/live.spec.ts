/** Processes, terminals and notebooks. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { api, eventually, newId, SERVER, withPage } from './harness.ts';

const part = (id: string, name: string) => `${SERVER}/#/sessions/${id}/${name}`;

test('a process is started, followed, given input, and stopped with its session', () =>
  withPage(async (page) => {
    const id = newId('beside');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(part(id, 'processes'));
    await page.getByRole('button', { name: 'Start a process' }).click();
    await page.getByLabel('Command').fill('echo "<b>ready</b>"; while read line; do echo "got $line"; done');
    await page.getByLabel('Tag').fill('echo');
    await page.getByLabel('It takes input').check();
    await page.getByRole('dialog').getByRole('button', { name: 'Start' }).click();
    const output = page.getByRole('region', { name: 'Output of the process' });
    await output.getByText('<b>ready</b>').waitFor();
    await page.getByLabel('Input', { exact: true }).fill('a line');
    await page.getByRole('button', { name: 'Send' }).click();
    await output.getByText('got a line').waitFor();
    await page.getByRole('button', { name: 'Stop all' }).click();
    await page.getByRole('dialog').getByRole('button', { name: 'Stop it' }).click();
    await page.locator('.toast', { hasText: 'All processes have ended.' }).waitFor();
    await page.getByRole('button', { name: 'Stop all' }).waitFor({ state: 'detached' });
  }));

test('a shell in a terminal goes on when the page is left, within the page’s policy', () =>
  withPage(async (page, complaints) => {
    const id = newId('shell');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(part(id, 'terminal'));
    await page.getByRole('button', { name: 'New shell' }).click();
    const screen = page.locator('.xterm-rows');
    await page.waitForURL(/terminal\/proc_/);
    await page.keyboard.type('printf "\\033[38;2;255;100;0m%s\\033[0m\\n" in-$((40 + 2)); NAME=kept\n');
    await screen.getByText('in-42', { exact: true }).first().waitFor();
    const color = await screen
      .getByText('in-42', { exact: true })
      .first()
      .evaluate((span) => getComputedStyle(span).color);
    assert.equal(color, 'rgb(255, 100, 0)');
    await page.reload();
    await screen.getByText('in-42').first().waitFor();
    await page.locator('.xterm').click();
    await page.keyboard.type('echo still-$NAME\n');
    await screen.getByText('still-kept', { exact: true }).waitFor();
    await page.keyboard.type('exit 3\n');
    await page.getByText('It ended with exit code 3.').waitFor();
    assert.deepEqual(complaints, []);
  }));

test('cells share an interpreter, and their results can do nothing', () =>
  withPage(async (page) => {
    const id = newId('cells');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(part(id, 'notebook'));
    const cell = async (number: number, code: string) => {
      await page.getByRole('textbox', { name: `Cell ${number}` }).fill(code);
      await page.getByRole('button', { name: `Run cell ${number}` }).click();
    };
    await cell(1, 'numbers = [1, 2, 3]');
    await cell(2, 'print("the sum"); sum(numbers) * 7');
    await page.getByRole('region', { name: 'Output of cell 2' }).getByText('the sum').waitFor();
    await page.getByRole('region', { name: 'Result' }).getByText('42').waitFor();
    await cell(3, '1 / 0');
    await page.getByRole('region', { name: 'Output of cell 3' }).getByText('ZeroDivisionError').first().waitFor();
    await cell(
      4,
      'from IPython.display import HTML\nHTML("<h2>shown</h2><script>parent.document.title = \'pwned\'</script>")',
    );
    await page.frameLocator('iframe').getByRole('heading', { name: 'shown' }).waitFor();
    assert.doesNotMatch(await page.title(), /pwned/);
    await page.getByRole('button', { name: 'Restart' }).click();
    await page.getByRole('dialog').getByRole('button', { name: 'Restart' }).click();
    await page.locator('.toast', { hasText: 'new interpreter' }).waitFor();
    await cell(5, 'numbers');
    await page.getByRole('region', { name: 'Output of cell 5' }).getByText('NameError').first().waitFor();
  }));

test('a cell’s output is in the order of its writes, and is updated and cleared', () =>
  withPage(async (page, complaints) => {
    const id = newId('order');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(part(id, 'notebook'));
    const run = async (number: number, code: string) => {
      await page.getByRole('textbox', { name: `Cell ${number}` }).fill(code);
      await page.getByRole('button', { name: `Run cell ${number}` }).click();
    };
    const shows = (number: number, pattern: RegExp) =>
      eventually(async () => {
        const output = page
          .locator('.cell-box')
          .nth(number - 1)
          .locator('.cell-output');
        return (await output.count()) > 0 && pattern.test((await output.textContent()) ?? '');
      }, `cell ${number} shows ${pattern}`);
    await run(
      1,
      'print("one"); handle = display("two", display_id="d"); print("three"); display("four"); handle.update("six"); 1/0',
    );
    await shows(1, /^one\s*'six'\s*three\s*'four'\s*-+\s*ZeroDivisionError.*: division by zero\s*$/s);
    await run(
      2,
      'from IPython.display import clear_output\nprint("old"); clear_output(); print("new"); handle.update("7")',
    );
    await shows(2, /^new\s*$/);
    await shows(1, /^one\s*'7'\s*three/);
    await run(3, 'print("old"); clear_output(wait=True); display("new")');
    await shows(3, /^'new'\s*$/);
    await run(4, 'import io, sys\nsys.stderr = io.StringIO()\n1/0');
    await shows(4, /^-+\s*ZeroDivisionError.*: division by zero\s*$/s);
    assert.deepEqual(complaints, []);
  }));

test('results that aren’t what they say leave the notebook as it is', () =>
  withPage(async (page, complaints) => {
    const id = newId('results');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.goto(part(id, 'notebook'));
    const cell = async (number: number, code: string) => {
      await page.getByRole('textbox', { name: `Cell ${number}` }).fill(code);
      await page.getByRole('button', { name: `Run cell ${number}` }).click();
    };
    await cell(1, "display({'image/png': 'no Base64'}, raw=True)");
    await page.getByText('This isn’t a picture').waitFor();
    await cell(2, "display({'application/vnd.x+json': {'height': 77}}, raw=True)");
    await page.locator('.json', { hasText: '77' }).waitFor();
    await cell(3, 'print("alive")');
    await page.getByRole('region', { name: 'Output of cell 3' }).getByText('alive').waitFor();
    assert.deepEqual(complaints, []);
  }));

/** Break the first answer of `/stream` off, once its first piece has come. */
function breakOff(): void {
  const real = window.fetch;
  let broken = false;
  window.fetch = async (...given) => {
    const response = await real(...given);
    if (broken || !String(given[0]).endsWith('/stream') || !response.body) return response;
    broken = true;
    const reader = response.body.getReader();
    let pieces = 0;
    const body = new ReadableStream({
      async pull(controller) {
        if (pieces++) {
          await reader.cancel();
          controller.error(new TypeError('broken off'));
        } else controller.enqueue((await reader.read()).value);
      },
    });
    return new Response(body, { status: response.status, headers: response.headers });
  };
}

test('a run is followed to its end where the connection breaks, and a line written anew is one line (soak)', () =>
  withPage(async (page) => {
    const id = newId('broken');
    await api('/api/sessions', { language: 'python', session_id: id });
    await page.addInitScript(breakOff);
    await page.goto(part(id, 'run'));
    await page
      .getByRole('textbox', { name: 'Code' })
      .fill(
        'import time\nfor n in range(4):\n  print(f"step {n}", end="\\r", flush=True); time.sleep(0.3)\nprint()\nprint("last")\n',
      );
    await page.getByRole('button', { name: 'Run', exact: true }).click();
    const output = page.getByRole('region', { name: 'Output of the run' });
    await output.getByText('last').waitFor();
    assert.equal((await output.locator('.output-line').first().textContent())?.trim(), 'step 3');
    await page.getByRole('button', { name: 'Run', exact: true }).waitFor();
    assert.equal(await page.getByRole('alert').count(), 0);
  }));
