'use strict';
// Descriptor 0 of a Node or TypeScript context: what a cell's `stdin` is for `fs.readFileSync(0)` and for processes
// that the cell starts. Node can't duplicate a descriptor, but an open takes the lowest number that is free.
const { Buffer, Object } = global; // cells may declare others: see node_kernel.cjs
const { randomUUID } = require('node:crypto');
const { Readable } = require('node:stream');
const { closeSync, fstatSync, openSync, rmSync, writeFileSync } = Object.assign({}, require('node:fs'));

// Which file it is; undefined where it is closed.
const identity = () => {
  try {
    const { dev, ino } = fstatSync(0);
    return `${dev} ${ino}`;
  } catch {
    return undefined;
  }
};
let ours = identity();

// Opens the file as descriptor 0, unless a cell has closed that and uses the number for something else. An open in
// another thread of Node's may take the number in between: then it is that one's.
const open = (file) => {
  const before = identity();
  if (before !== undefined && before !== ours) return;
  if (before !== undefined) closeSync(0);
  const fd = openSync(file, 'r');
  if (fd === 0) ours = identity();
  else closeSync(fd);
};

// Gives the cell this standard input. Returns what process.stdin is for it.
const giveStdin = (text) => {
  if (text) {
    const file = `/tmp/.era-stdin-${randomUUID()}`;
    try {
      writeFileSync(file, text, { flag: 'wx', mode: 0o600 });
      open(file);
    } catch {
      // There is no room in /tmp: the cell has process.stdin all the same.
    } finally {
      rmSync(file, { force: true });
    }
  }
  return Object.assign(Readable.from(text ? [Buffer.from(text)] : [], { objectMode: false }), { fd: 0 });
};

// Has standard input empty again.
const takeStdin = () => {
  try {
    open('/dev/null');
  } catch {
    // It stays closed; the cell has ended all the same.
  }
};

module.exports = { giveStdin, takeStdin };
