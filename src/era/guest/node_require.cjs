'use strict';
// Gives ES modules and TypeScript the `require` that CommonJS has, resolving from the working directory, and to every
// module './era_storage.js', the storage's client, where there is no such file of the session's own.
const fs = require('node:fs');
const Module = require('node:module');
const path = require('node:path');

Object.defineProperty(globalThis, 'require', {
  value: Module.createRequire(`${process.cwd()}/`),
  configurable: true,
  enumerable: false,
  writable: true,
});

const CLIENT = `${__dirname}/lib/era_storage.js`;
const NAMED = /^(?:\.{1,2}\/)+era_storage(?:\.js)?$/;
const isThere = (directory, request) => {
  const file = path.resolve(directory, request);
  return fs.existsSync(file) || fs.existsSync(`${file}.js`);
};

// The cache of paths that `require` has resolved, by request and directory. A lookup that misses goes to the cache's
// prototype, which is ours. So nothing of this is in the way, or in the stack trace, of any other `require`.
Object.setPrototypeOf(
  Module._pathCache,
  new Proxy(Object.create(null), {
    get(_, key) {
      if (typeof key !== 'string') return undefined;
      const [request, directory, more] = key.split('\0', 3);
      if (directory === undefined || more !== undefined || !NAMED.test(request)) return undefined;
      return isThere(directory, request) ? undefined : CLIENT;
    },
  }),
);

// `import` has no such cache, but resolve hooks. Those show in stack traces, so only programs that need them have them.
const mentionsStorage = () => {
  try {
    return fs.readFileSync(process.argv[1]).includes('era_storage');
  } catch {
    return false;
  }
};
if (mentionsStorage()) {
  Module.registerHooks({
    resolve(specifier, context, next) {
      const directory = context.parentURL?.startsWith('file:') && path.dirname(new URL(context.parentURL).pathname);
      if (!directory || !NAMED.test(specifier) || isThere(decodeURIComponent(directory), specifier)) {
        return next(specifier, context);
      }
      return { url: `file://${CLIENT}`, format: 'commonjs', shortCircuit: true };
    },
  });
}
