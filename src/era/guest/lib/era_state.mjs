// The session's state, in two lines, for Node, TypeScript and Deno:
//
//   import { state } from './era_state.js';
//   state((data) => { data.n = (data.n ?? 0) + 1; });
//
// What `data` is when the function returns, or when its promise resolves, is in `.session_data.json` then: all of it,
// or nothing where it throws. While the promise of a call is waited for, further calls wait too and return promises.
// A file of your own called era_state.js is loaded instead of this one.
import { AsyncLocalStorage } from 'node:async_hooks';
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import process from 'node:process';

// Where the file is, whatever directory the program has gone to. Outside of a session: here.
const PLACE = process.env.ERA_SESSION === 'true' ? '/workspace' : process.cwd();
const FILE = `${PLACE}/.session_data.json`;
const within = new AsyncLocalStorage();
let last = null; // resolves once the last of the calls has ended that are waited for

const isObject = (value) => typeof value === 'object' && value !== null && !Array.isArray(value);

/** The session's data; empty where there is none. Throws if the file is no JSON object. */
export function load() {
  let text;
  try {
    text = fs.readFileSync(FILE, 'utf8');
  } catch (error) {
    if (error.code === 'ENOENT') return {};
    throw error;
  }
  const data = JSON.parse(text);
  if (!isObject(data)) throw new TypeError(`${FILE} is not a JSON object`);
  return data;
}

/** Put other data in its place: all of it, or nothing. */
export function save(data) {
  if (!isObject(data)) throw new TypeError("a session's data is an object");
  const text = JSON.stringify(data, null, 2);
  const next = `${FILE}.${randomUUID()}`;
  try {
    fs.writeFileSync(next, text, { flag: 'wx' });
    fs.renameSync(next, FILE);
  } catch (error) {
    fs.rmSync(next, { force: true });
    throw error;
  }
}

/** Call `change` with the data, and keep what it made of it. Returns what it returns. */
export function state(change) {
  if (within.getStore()?.isOpen) throw new Error("a call of state() can't be within another: its change would be lost");
  const value = last === null ? apply(change) : last.then(() => apply(change));
  if (typeof value?.then !== 'function') return value;
  const given = value.finally(() => {
    if (last === ended) last = null;
  });
  const ended = value.then(
    () => {},
    () => {},
  );
  last = ended;
  return given;
}

function apply(change) {
  const data = load();
  const call = { isOpen: true };
  const end = (value) => {
    call.isOpen = false;
    save(data);
    return value;
  };
  try {
    const value = within.run(call, change, data);
    if (typeof value?.then !== 'function') return end(value);
    return Promise.resolve(value).then(end).finally(() => (call.isOpen = false));
  } catch (error) {
    call.isOpen = false;
    throw error;
  }
}
