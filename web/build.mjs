// Bundles the dashboard into the package, where the server finds it: `node build.mjs [--watch]`.
//
// Names of scripts hold a digest of their content, so a browser may keep them for good. Styles and the script that sets the
// theme are in the page: it is painted as soon as it has come, where it would wait for each file that it needs first. The
// page is written last: while it isn't there, the server knows that there is no dashboard.

import { copyFile, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build, context } from 'esbuild';

const here = dirname(fileURLToPath(import.meta.url));
const target = join(here, '..', 'src', 'era', 'web', 'dashboard');

/** What the page has in itself. */
const IN_PAGE = ['theme.ts', 'main.css'];

/** Write the page with the names that the bundler has chosen. */
const page = {
  name: 'page',
  setup(bundler) {
    bundler.onEnd(async ({ metafile, errors }) => {
      if (errors.length) return;
      const parts = { preloads: '' };
      for (const [path, { entryPoint, imports }] of Object.entries(metafile.outputs)) {
        const name = entryPoint?.split('/').pop();
        if (IN_PAGE.includes(name)) {
          parts[name] = (await readFile(join(here, path), 'utf8')).trim();
          await rm(join(here, path));
        } else if (name === 'main.tsx') {
          parts[name] = `/assets/${path.split('/').pop()}`;
          // What the page's script is loaded with is asked for beside it, and not only once it has come.
          for (const each of imports)
            if (each.kind === 'import-statement')
              parts.preloads += `<link rel="modulepreload" href="/assets/${each.path.split('/').pop()}">`;
        }
      }
      const html = await readFile(join(here, 'src', 'index.html'), 'utf8');
      const filled = html.replace(/\{\{([\w.]+)\}\}/g, (_, name) => parts[name]);
      await copyFile(join(here, 'src', 'icon.svg'), join(target, 'dashboard-icon.svg'));
      await writeFile(join(target, 'index.html'), filled);
    });
  },
};

/**
 * xterm.js makes <style> elements and style attributes, which the page's content security policy refuses. Here the former
 * become elements of our own, which adopt what they are given (src/live/sheet.ts), and the latter go by the CSSOM.
 */
const inertStyles = {
  name: 'inert-styles',
  setup(bundler) {
    bundler.onLoad({ filter: /@xterm\/xterm\/lib\/xterm\.mjs$/ }, async ({ path }) => {
      const text = await readFile(path, 'utf8');
      const contents = text
        .replaceAll('createElement("style")', 'createElement("era-sheet")')
        .replace(
          /(\w+)\.setAttribute\("style",`\$\{\w+\.getAttribute\("style"\)\|\|""\}\$\{(\w+)\};`\)/,
          '$1.style.cssText+=$2+";"',
        );
      if (text.split('createElement("style")').length !== 4 || contents.includes('setAttribute("style"'))
        throw new Error('xterm.js makes styles in another way now: look at inertStyles in build.mjs');
      return { contents, loader: 'js' };
    });
  },
};

/**
 * pdf.js reads documents in a worker, which is a file by itself; importing it gives its name. It has no bound on what a
 * document unpacks to, so the bound comes before it (src/session/bounded.js). What some documents need is beside it, under names that pdf.js knows: the fonts that each reader has, tables of characters, decoders of two kinds
 * of pictures.
 */
const pdfjs = {
  name: 'pdfjs',
  setup(bundler) {
    const bound = join(here, 'src', 'session', 'bounded.js');
    bundler.onLoad({ filter: /pdf\.worker\.min\.mjs$/ }, async ({ path }) => ({
      contents: Buffer.concat([await readFile(bound), await readFile(path)]),
      loader: 'file',
      watchFiles: [bound],
    }));
    bundler.onEnd(async () => {
      for (const folder of ['standard_fonts', 'cmaps', 'wasm']) {
        const parts = join(here, 'node_modules', 'pdfjs-dist', folder);
        for (const name of await readdir(parts))
          if (/\.(pfb|ttf|bcmap)$|_nowasm_fallback\.js$/.test(name))
            await copyFile(join(parts, name), join(target, name));
      }
    });
  },
};

const options = {
  absWorkingDir: here,
  entryPoints: ['src/main.tsx', 'src/theme.ts', 'src/styles/main.css'],
  outdir: target,
  entryNames: '[name]-[hash]',
  chunkNames: '[name]-[hash]',
  assetNames: '[name]-[hash]',
  publicPath: '/assets',
  bundle: true,
  splitting: true,
  format: 'esm',
  target: 'es2022',
  jsx: 'automatic',
  jsxImportSource: 'preact',
  minify: true,
  metafile: true,
  legalComments: 'none',
  loader: { '.css': 'css' },
  define: { 'process.env.NODE_ENV': '"production"' },
  logLevel: 'warning',
  plugins: [inertStyles, pdfjs, page],
};

await rm(target, { recursive: true, force: true });
await mkdir(target, { recursive: true });
if (process.argv.includes('--watch')) await (await context(options)).watch();
else await build(options);
