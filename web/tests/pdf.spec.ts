/** PDF documents in the view of a file: shown page by page, and able to do nothing. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { deflateSync } from 'node:zlib';
import { getDocument } from 'pdfjs-dist/legacy/build/pdf.mjs';
import type { Page } from 'playwright-core';
import { api, eventually, newId, SERVER, withPage } from './harness.ts';

/** A document of numbered objects, of which the first is its catalog. */
function pdfOf(objects: (string | Buffer)[]): Buffer {
  const parts = [Buffer.from('%PDF-1.7\n')];
  const places: number[] = [];
  let length = parts[0]?.length ?? 0;
  const add = (part: string | Buffer) => {
    const bytes = Buffer.from(part);
    parts.push(bytes);
    length += bytes.length;
  };
  objects.forEach((object, index) => {
    places.push(length);
    add(`${index + 1} 0 obj\n`);
    add(object);
    add('\nendobj\n');
  });
  const start = length;
  const rows = places.map((place) => `${String(place).padStart(10, '0')} 00000 n \n`).join('');
  add(`xref\n0 ${objects.length + 1}\n0000000000 65535 f \n${rows}`);
  add(`trailer << /Size ${objects.length + 1} /Root 1 0 R >>\nstartxref\n${start}\n%%EOF\n`);
  return Buffer.concat(parts);
}

function stream(content: string | Buffer, entries = ''): Buffer {
  const bytes = Buffer.from(content);
  return Buffer.concat([
    Buffer.from(`<< /Length ${bytes.length} ${entries} >>\nstream\n`),
    bytes,
    Buffer.from('\nendstream'),
  ]);
}

const written = (text: string) => `BT /F1 24 Tf 72 700 Td (${text}) Tj ET 72 600 100 50 re f`;

interface Made {
  catalog?: string;
  page?: string;
  font?: string;
  more?: (string | Buffer)[];
}

/** A document with a page for each content. Its objects: catalog, pages, font, `more` from 4 on, then the pages. */
function document(contents: (string | Buffer)[], { catalog = '', page = '', font, more = [] }: Made = {}): Buffer {
  const first = 4 + more.length;
  const kids = contents.map((_, index) => `${first + 2 * index} 0 R`).join(' ');
  return pdfOf([
    `<< /Type /Catalog /Pages 2 0 R ${catalog} >>`,
    `<< /Type /Pages /Count ${contents.length} /Kids [${kids}] /MediaBox [0 0 612 792]
      /Resources << /Font << /F1 3 0 R >> >> >>`,
    font ?? '<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>',
    ...more,
    ...contents.flatMap((content, index) => [
      `<< /Type /Page /Parent 2 0 R /Contents ${first + 2 * index + 1} 0 R ${page} >>`,
      Buffer.isBuffer(content) ? content : stream(content),
    ]),
  ]);
}

/** Give a session a file; the answer is the path of its view. */
async function stored(session: string, name: string, content: Buffer): Promise<string> {
  const response = await fetch(`${SERVER}/api/sessions/${session}/files/${name}`, {
    method: 'PUT',
    body: new Uint8Array(content),
  });
  assert.ok(response.ok, await response.text());
  return `${SERVER}/#/sessions/${session}/files/${name}`;
}

async function session(name: string): Promise<string> {
  const id = newId(name);
  await api('/api/sessions', { language: 'python', session_id: id });
  return id;
}

const sheet = (page: Page, n: number) => page.getByRole('group', { name: `Page ${n}`, exact: true });

/** Something of a page is drawn. */
async function drawn(page: Page, n: number): Promise<void> {
  const canvas = sheet(page, n).locator('canvas');
  await canvas.waitFor();
  const dark = await canvas.evaluate((element) => {
    const { width, height } = element as HTMLCanvasElement;
    const { data } = (element as HTMLCanvasElement).getContext('2d')?.getImageData(0, 0, width, height) ?? { data: [] };
    let pixels = 0;
    for (let at = 0; at < data.length; at += 4) if ((data[at] ?? 255) < 64) pixels++;
    return pixels / (width * height);
  });
  assert.ok(dark > 0.005, `of page ${n} only ${dark} is dark`);
}

test('a large document is read and drawn as far as it is looked at', () =>
  withPage(async (page, complaints) => {
    const id = await session('pages');
    const noise = `\n% ${'x'.repeat(1_000_000)}`;
    const content = document(Array.from({ length: 10 }, (_, n) => written(`This is leaf ${n + 1}`) + noise));
    let read = 0;
    page.on('response', async (response) => {
      if (response.url().endsWith('/many.pdf')) read += Number(response.headers()['content-length'] ?? 0);
    });
    await page.goto(await stored(id, 'many.pdf', content));
    await sheet(page, 1).getByText('This is leaf 1').waitFor();
    await drawn(page, 1);
    await page.getByText('of 10').waitFor();
    assert.equal(await page.locator('[role=group][aria-label^="Page "]').count(), 1);
    // By keyboard: a page by its number, larger, and back to the start.
    await page.getByLabel('Page', { exact: true }).fill('8');
    await page.keyboard.press('Enter');
    await sheet(page, 8).getByText('This is leaf 8').waitFor();
    await drawn(page, 8);
    assert.equal(await sheet(page, 1).count(), 0);
    const width = (await sheet(page, 8).boundingBox())?.width ?? 0;
    await page.getByRole('button', { name: 'Larger' }).press('Enter');
    await eventually(async () => ((await sheet(page, 8).boundingBox())?.width ?? 0) > width * 1.4, 'it is larger');
    await drawn(page, 8);
    await page.getByRole('region', { name: 'Pages of many.pdf' }).press('Home');
    await drawn(page, 1);
    assert.ok(read > 1e6 && read < content.length / 2, `${read} of ${content.length} bytes were read`);
    assert.equal(page.workers().length, 1);
    await page.getByRole('link', { name: 'Data', exact: true }).click();
    await eventually(() => page.workers().length === 0, 'the worker ends with the preview');
    assert.deepEqual(complaints, []);
  }));

test('scripts, links, forms and what is elsewhere are nothing but drawn', () =>
  withPage(async (page, complaints) => {
    const id = await session('scripts');
    const canary = `${SERVER}/api/sessions/${id}/canary`;
    const script = `app.alert('pwned'); this.submitForm('${canary}'); app.launchURL('${canary}');`;
    const act = (kind: string, entries: string) => `<< /Type /Action /S /${kind} ${entries} >>`;
    const content = document([written('A document that means harm')], {
      catalog: `/OpenAction ${act('JavaScript', `/JS (${script.replaceAll(/[()]/g, '\\$&')})`)}
        /AcroForm << /Fields [4 0 R] /NeedAppearances true >> /AA << /WC ${act('URI', `/URI (${canary})`)} >>
        /Names << /JavaScript << /Names [(a) ${act('JavaScript', `/JS (app.alert\\(1\\))`)}] >> >>`,
      page: `/Annots [4 0 R 5 0 R 6 0 R] /AA << /O ${act('SubmitForm', `/F (${canary})`)} >>`,
      // The matrix of a font once was code to pdf.js (CVE-2024-4367).
      font: `<< /Type /Font /Subtype /Type1 /BaseFont /Own /FirstChar 32 /LastChar 126
        /FontMatrix [1 2 3 4 5 (0\\); document.title = 'pwned'//)] >>`,
      more: [
        `<< /Type /Annot /Subtype /Widget /FT /Tx /T (field) /V (typed) /Rect [72 400 300 440]
          /AA << /K ${act('JavaScript', '/JS (app.alert\\(2\\))')} /F ${act('JavaScript', '/JS (app.alert\\(3\\))')} >> >>`,
        `<< /Type /Annot /Subtype /Link /Rect [0 0 612 792] /A ${act('URI', `/URI (${canary})`)} >>`,
        `<< /Type /Annot /Subtype /Link /Rect [0 0 612 792] /A ${act('URI', '/URI (javascript:document.title=1)')} >>`,
      ],
    });
    // To whoever runs scripts and follows links, it is what it claims to be.
    const read = await getDocument({ data: new Uint8Array(content), verbosity: 0 }).promise;
    // It gives them as a map, other than its types say.
    assert.match(JSON.stringify([...((await read.getJSActions()) as unknown as Map<string, string[]>)]), /pwned/);
    assert.match(JSON.stringify(await (await read.getPage(1)).getAnnotations()), /canary/);
    await read.loadingTask.destroy();

    const asked: string[] = [];
    page.on('request', (request) => asked.push(request.url()));
    page.on('dialog', (dialog) => asked.push(`dialog ${dialog.message()}`));
    await page.goto(await stored(id, 'harm.pdf', content));
    await sheet(page, 1).getByText('A document that means harm').waitFor();
    await drawn(page, 1);
    await sheet(page, 1).click();
    assert.equal(await page.locator('.pdf').locator('a, input, form, iframe, script, object, embed').count(), 0);
    assert.doesNotMatch(await page.title(), /pwned/);
    assert.match(page.url(), /harm\.pdf$/);
    assert.deepEqual(
      asked.filter((url) => url.includes('canary') || url.startsWith('dialog') || !url.startsWith(SERVER)),
      [],
    );
    assert.deepEqual(complaints, []);
  }));

/** Each of these has an end with its preview. */
const endWithTheirPreview = (documents: (bomb: Buffer) => [name: string, content: Buffer][]) => () =>
  withPage(async (page, complaints) => {
    const id = await session('heavy');
    for (const [name, content] of documents(deflateSync(Buffer.alloc(1 << 28)))) {
      await page.goto(await stored(id, name, content));
      await page.getByRole('heading', { name }).waitFor();
      await page
        .locator('.pdf canvas, .problem')
        .first()
        .waitFor({ timeout: 2000 })
        .catch(() => undefined); // or neither
      // The page answers, and whatever the document keeps busy is gone once another part is looked at.
      await page.getByRole('link', { name: 'Data', exact: true }).click();
      await page.getByRole('heading', { name: 'Now' }).waitFor();
      await eventually(() => page.workers().length === 0, `${name} ends`);
    }
    assert.deepEqual(complaints, []);
  });

test(
  'documents that are broken, endless or unpack to much end with their preview',
  endWithTheirPreview((bomb) => [
    ['cut.pdf', document([written('x')]).subarray(0, 60)],
    ['text.pdf', Buffer.from('this is no document')],
    ['loop.pdf', pdfOf(['<< /Type /Catalog /Pages 2 0 R >>', '<< /Type /Pages /Count 9 /Kids [2 0 R 2 0 R] >>'])],
    ['many.pdf', pdfOf(['<< /Type /Catalog /Pages 2 0 R >>', '<< /Type /Pages /Count 2000000000 /Kids [] >>'])],
    ['bomb.pdf', document([stream(bomb, '/Filter /FlateDecode')])],
  ]),
);

test(
  'documents that are heavy end with their preview (soak)',
  endWithTheirPreview((bomb) => [
    ['strokes.pdf', document(['0 0 m 600 700 l S\n'.repeat(400_000)])],
    ['vast.pdf', document([written('vast')], { page: '/MediaBox [0 0 1e9 1e-3] /UserUnit 1e6' })],
    [
      'picture.pdf',
      document(['600 0 0 700 0 0 cm /I Do'], {
        page: '/Resources << /XObject << /I 4 0 R >> >>',
        more: [
          stream(
            bomb,
            `/Type /XObject /Subtype /Image /Width 60000 /Height 60000 /BitsPerComponent 8 /ColorSpace /DeviceRGB
                /Filter /FlateDecode`,
          ),
        ],
      }),
    ],
  ]),
);

test('what a page unpacks to has a bound (soak)', () =>
  withPage(async (page) => {
    const id = await session('unpacks');
    const unpacked = (name: string, size: number) => {
      const content = Buffer.alloc(size, ' ');
      content.write(written('behind it all'), size - 100);
      return document([
        written(`Page one of ${name}`),
        stream(deflateSync(content, { level: 1 }), '/Filter /FlateDecode'),
      ]);
    };
    for (const [name, size] of [
      ['much.pdf', 20 << 20],
      ['more.pdf', 300 << 20],
    ] as const) {
      await page.goto(await stored(id, name, unpacked(name, size)));
      await sheet(page, 1).getByText(`Page one of ${name}`).waitFor();
      await page.getByLabel('Page', { exact: true }).fill('2');
      await page.keyboard.press('Enter');
      if (name === 'much.pdf') await sheet(page, 2).getByText('behind it all').waitFor();
      else await page.locator('.problem').getByText('a part of it is larger than 256 MiB').waitFor();
    }
  }));

test('a document with a password, one that has changed, and letters without a font of their own', () =>
  withPage(async (page) => {
    const id = await session('letters');
    const symbols = document(['BT /F1 40 Tf 72 600 Td (abc) Tj ET'], {
      font: '<< /Type /Font /Subtype /Type1 /BaseFont /Symbol >>',
    });
    const japanese = document(['BT /F1 40 Tf 72 600 Td <82a082a282a4> Tj ET'], {
      font: '<< /Type /Font /Subtype /Type0 /BaseFont /Gothic /Encoding /90ms-RKSJ-H /DescendantFonts [4 0 R] >>',
      more: [
        `<< /Type /Font /Subtype /CIDFontType0 /BaseFont /Gothic
          /CIDSystemInfo << /Registry (Adobe) /Ordering (Japan1) /Supplement 2 >> /FontDescriptor 5 0 R >>`,
        `<< /Type /FontDescriptor /FontName /Gothic /Flags 4 /FontBBox [0 0 1000 1000] /ItalicAngle 0 /Ascent 800
          /Descent -200 /CapHeight 700 /StemV 80 >>`,
      ],
    });
    await page.goto(await stored(id, 'symbols.pdf', symbols));
    await sheet(page, 1).getByText('αβχ').waitFor();
    await page.goto(await stored(id, 'japanese.pdf', japanese));
    await sheet(page, 1).getByText('あいう').waitFor();
  }));
