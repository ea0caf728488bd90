'use strict';
// Has output written to the end. Gives ES modules and TypeScript the `require` that CommonJS has, resolving from the
// working directory, and to every module './era_storage.js' and './era_state.js', which are ERA's own, where the session
// has no such file.
const { Object, Proxy, String, decodeURIComponent, process } = global; // cells may declare others: see node_kernel.cjs
const fs = require('node:fs');
const Module = require('node:module');
const path = require('node:path');
const { URL, fileURLToPath, pathToFileURL } = require('node:url');

Object.defineProperty(global, 'require', {
  value: Module.createRequire(`${process.cwd()}/`),
  configurable: true,
  enumerable: false,
  writable: true,
});

const LIBRARY = { era_storage: `${__dirname}/lib/era_storage.js`, era_state: `${__dirname}/lib/era_state.mjs` };
const NAMED = /^(?:\.{1,2}\/)+(era_storage|era_state)(?:\.js)?$/;
const ours = (request) => LIBRARY[NAMED.exec(request)[1]];
const isTypeScript = process.execArgv.includes('--experimental-transform-types');
const isThere = (directory, request) => {
  const file = path.resolve(directory, request);
  const written = isTypeScript ? meant(file) : undefined;
  return fs.existsSync(file) || fs.existsSync(`${file}.js`) || /\.[cm]?tsx?$/.test(written ?? '');
};

// Node writes to a pipe without blocking: when a program exits, what didn't fit into the pipe would be lost. It would leave
// the pipe like that to child processes, too, whose writes then fail. So the stream blocks, once the program makes it.
for (const name of ['stdout', 'stderr']) {
  const { get, ...property } = Object.getOwnPropertyDescriptor(process, name);
  const getBlocking = () => {
    Object.defineProperty(process, name, { ...property, get });
    const stream = get.call(process);
    if (stream._type === 'pipe') stream._handle.setBlocking(true);
    return stream;
  };
  Object.defineProperty(process, name, { ...property, get: getBlocking });
}

// The cache of paths that `require` has resolved, by request and directory. A lookup that misses goes to the cache's
// prototype, which is ours. So nothing of this is in the way, or in the stack trace, of any other `require`.
Object.setPrototypeOf(
  Module._pathCache,
  new Proxy(Object.create(null), {
    get(_, key) {
      if (typeof key !== 'string') return undefined;
      const [request, directory, more] = key.split('\0', 3);
      if (directory === undefined || more !== undefined || !NAMED.test(request)) return undefined;
      return isThere(directory, request) ? undefined : ours(request);
    },
  }),
);

// TypeScript names modules of its own without their endings, or with those of the JavaScript that they would become.
const ENDINGS = ['.ts', '.tsx', '.mts', '.cts', '.js', '.mjs', '.cjs', '.json'];
const FOR_JAVASCRIPT = { '.js': ['.ts', '.tsx'], '.jsx': ['.tsx'], '.mjs': ['.mts'], '.cjs': ['.cts'] };
const isFile = (file) => fs.statSync(file, { throwIfNoEntry: false })?.isFile() ?? false;
const meant = (file) => {
  const ending = path.extname(file);
  const others = (FOR_JAVASCRIPT[ending] ?? []).map((other) => file.slice(0, -ending.length) + other);
  const added = ENDINGS.map((other) => file + other);
  return [...others, ...added, ...ENDINGS.map((other) => path.join(file, `index${other}`))].find(isFile);
};
// The answer of `next`; if that is an error, then one without our frames.
const nextWithoutUs = (next, specifier, context) => {
  try {
    return next(specifier, context);
  } catch (error) {
    const isOurs = (line) => line.includes(__filename) || line.includes('node:internal/modules/customization_hooks');
    const lines = String(error.stack).split('\n');
    error.stack = lines.filter((line) => !isOurs(line)).join('\n');
    throw error;
  }
};

// `import` has no such cache, but resolve hooks. Those show in stack traces, so only programs that need them have them.
const lookAtProgram = () => {
  const source = (() => {
    try {
      return fs.readFileSync(process.argv[1], 'utf8');
    } catch {
      return '';
    }
  })();
  if (isTypeScript && /['"`]\.{1,2}(\/|['"`])/.test(source)) {
    Module.registerHooks({
      resolve(specifier, context, next) {
        if (!/^\.{1,2}(\/|$)/.test(specifier) || !context.parentURL?.startsWith('file:')) return next(specifier, context);
        const url = new URL(specifier, context.parentURL);
        const file = isFile(fileURLToPath(url)) ? undefined : meant(fileURLToPath(url));
        if (context.conditions.includes('require')) return next(file ?? specifier, context);
        if (file === undefined) return nextWithoutUs(next, specifier, context);
        const importAttributes = file.endsWith('.json')
          ? { type: 'json', ...context.importAttributes }
          : context.importAttributes;
        return { ...next(`${pathToFileURL(file)}${url.search}`, { ...context, importAttributes }), importAttributes };
      },
    });
  }

  if (source.includes('era_storage') || source.includes('era_state')) {
    Module.registerHooks({
      resolve(specifier, context, next) {
        if (!NAMED.test(specifier) || !context.parentURL?.startsWith('file:')) return next(specifier, context);
        const directory = path.dirname(new URL(context.parentURL).pathname);
        if (isThere(decodeURIComponent(directory), specifier)) return next(specifier, context);
        const file = ours(specifier);
        return { url: `file://${file}`, format: file.endsWith('.mjs') ? 'module' : 'commonjs', shortCircuit: true };
      },
    });
  }
};

// A spare has no program yet: node_wait.cjs calls it once there is one.
module.exports = lookAtProgram;
if (path.basename(module.parent?.filename ?? '') !== 'node_wait.cjs') lookAtProgram();
