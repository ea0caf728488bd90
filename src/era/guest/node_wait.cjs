'use strict';
// Preloaded by a Node process that was started ahead of need: Node is up, its main file is not loaded yet. Wait at
// descriptor 3 for this run's environment, then let Node go on as if it had just been started.
const { isMainThread } = require('node:worker_threads');
const lookAtProgram = require('./node_require.cjs');

// Do what most programs do, without effect: Node loads and compiles its own parts when they are needed first.
// A warm run, alone, takes 0.85 of what it takes without this.
const rehearse = () => {
  const { openSync } = require('node:fs');
  const { Console } = require('node:console');
  const { Socket } = require('node:net');
  const { Writable } = require('node:stream');
  const written = new Writable({ write: (piece, encoding, done) => done() });
  new Console({ stdout: written, colorMode: false }).log('%s', 1, { a: [1] });
  // The pipe is opened anew: a socket makes its descriptor non-blocking, also for child processes that inherit it.
  // And one that is destroyed makes process.stderr, so only its handle is closed.
  const { _handle } = new Socket({ fd: openSync('/proc/self/fd/1', 'w'), readable: false, writable: true });
  _handle.unref();
  _handle.close();
};

if (isMainThread && process.env.ERA_SPARE) {
  const fs = require('node:fs');

  const read = (size) => {
    const buffer = Buffer.alloc(size);
    for (let filled = 0; filled < size; ) {
      const count = fs.readSync(3, buffer, filled, size - filled, null);
      if (count === 0) process.reallyExit(0);
      filled += count;
    }
    return buffer;
  };

  if (process.execArgv.includes('--experimental-transform-types')) {
    // Starting the compiler takes longer than most programs, so it is done ahead.
    require('node:module').stripTypeScriptTypes('enum A { B }', { mode: 'transform' });
  }
  try {
    rehearse();
  } catch {
    // Then the program does it.
  }
  const environment = JSON.parse(read(read(4).readUInt32BE()).toString());
  fs.closeSync(3);
  for (const name of Object.keys(process.env)) delete process.env[name];
  Object.assign(process.env, environment);
  // Or child processes and workers of the program would wait, too.
  const at = process.execArgv.indexOf('--require');
  if (at >= 0) process.execArgv.splice(at, 2);
}
lookAtProgram();
