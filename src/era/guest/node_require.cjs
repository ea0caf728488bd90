'use strict';
// Gives ES modules and TypeScript the `require` that CommonJS has, resolving from the working directory.
const { createRequire } = require('node:module');

Object.defineProperty(globalThis, 'require', {
  value: createRequire(`${process.cwd()}/`),
  configurable: true,
  enumerable: false,
  writable: true,
});
