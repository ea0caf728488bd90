'use strict';
// Gives ES modules and TypeScript the `require` that CommonJS has, resolving from the working directory, and every
// module './era_storage.js', where there is no such file of the session's own.
const { createRequire, registerHooks } = require('node:module');

Object.defineProperty(globalThis, 'require', {
  value: createRequire(`${process.cwd()}/`),
  configurable: true,
  enumerable: false,
  writable: true,
});

const STORAGE = /^(\.{1,2}\/)*era_storage(\.js)?$/;
const FILE = `file://${__dirname}/lib/era_storage.js`;
registerHooks({
  resolve(specifier, context, next) {
    if (!STORAGE.test(specifier)) return next(specifier, context);
    try {
      return next(specifier, context);
    } catch (error) {
      if (error.code !== 'MODULE_NOT_FOUND' && error.code !== 'ERR_MODULE_NOT_FOUND') throw error;
      return { url: FILE, format: 'commonjs', shortCircuit: true };
    }
  },
});
