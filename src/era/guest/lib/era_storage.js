'use strict';
// Storage that sessions share: KVStorage for text by key, D1Storage for SQL, R2Storage for bytes by key. Every call goes
// to ERA_STORAGE_URL and is durable when its promise resolves. A file of your own called era_storage.js is loaded
// instead of this one.
const { Buffer } = require('node:buffer');
const http = require('node:http');
const process = require('node:process');

// An agent of our own: the usual one may go by a proxy of the program's. A connection that was idle for 2 seconds is not
// used again, since the service closes it after some more.
const SILENT_MS = 60000;
const agent = new http.Agent({ keepAlive: true, maxSockets: 16, maxFreeSockets: 4, timeout: SILENT_MS });
const IDLE_MS = 2000;
const NO_STORAGE =
  'The session has "storage": false, or this is a command of its setup. PATCH it with "storage": true for its next run.';
agent.on('free', (socket) => {
  socket.eraFreeSince = Date.now();
});
agent.addRequest = function add(...given) {
  for (const socket of Object.values(agent.freeSockets).flat()) {
    if (Date.now() - socket.eraFreeSince > IDLE_MS) socket.destroy(); // so the agent takes another, or a new one
  }
  return http.Agent.prototype.addRequest.apply(this, given);
};

class StorageError extends Error {
  constructor(message, status = 0, code = 'unreachable', hint = '') {
    super(`${message} ${hint}`.trim());
    this.name = 'StorageError';
    Object.assign(this, { status, code, hint });
  }
}

const quoted = (text) => encodeURIComponent(String(text));

function pathOf(kind, namespace, rest) {
  // With nothing behind the slash it would be the path of all keys.
  if (String(rest) === '')
    throw new StorageError("That can't be a key.", 400, 'bad_key', 'Use 1 to 1024 bytes of UTF-8 without NUL.');
  return `/api/storage/${kind}/${quoted(namespace)}/${quoted(rest)}`;
}

function send(method, path, content) {
  if (!process.env.ERA_STORAGE_URL) throw new StorageError('There is no storage here.', 0, 'no_storage', NO_STORAGE);
  const where = /^http:\/\/([^/:]+):(\d+)/.exec(process.env.ERA_STORAGE_URL || '');
  if (!where) throw new StorageError("ERA_STORAGE_URL doesn't say where the storage is.", 0, 'no_storage');
  const headers =
    content === undefined
      ? {}
      : { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(content) };
  return new Promise((resolve, reject) => {
    const request = http.request({ agent, host: where[1], port: where[2], method, path, headers }, (response) => {
      const parts = [];
      response.on('data', (part) => parts.push(part));
      response.on('error', reject);
      response.on('end', () => resolve({ status: response.statusCode, text: Buffer.concat(parts).toString() }));
    });
    // The agent only ends connections that are idle. It may have done what was asked, so it isn't asked again.
    request.on('timeout', () => {
      request.destroy(new StorageError("The storage can't be reached: it said nothing for 60 seconds."));
    });
    request.on('error', (error) => {
      error.eraReused = request.reusedSocket;
      reject(error);
    });
    request.end(content);
  });
}

async function call(method, path, body, again = true) {
  const content = body === undefined ? undefined : JSON.stringify(body);
  let answer;
  for (;;) {
    try {
      answer = await send(method, path, content);
      break;
    } catch (error) {
      if (error instanceof StorageError) throw error;
      // The service has closed the connection, maybe after it did what was asked: it is asked again only if harmless.
      if (!error.eraReused || !again) throw new StorageError(`The storage can't be reached: ${error.message}.`);
      again = false;
    }
  }
  const told = JSON.parse(answer.text);
  if (answer.status >= 400) throw new StorageError(told.error, answer.status, told.code, told.hint);
  return told;
}

async function getOrNull(path) {
  try {
    return await call('GET', path);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

async function list(kind, namespace, prefix, limit) {
  const all = [];
  let cursor = '';
  while (limit === undefined || limit === null || all.length < limit) {
    const size = Math.min(1000, (limit ?? Infinity) - all.length);
    const query = `prefix=${quoted(prefix)}&limit=${size}${cursor}`;
    const page = await call('GET', `/api/storage/${kind}/${quoted(namespace)}?${query}`);
    all.push(...(kind === 'kv' ? page.keys : page.objects));
    if (!page.cursor) break;
    cursor = `&cursor=${quoted(page.cursor)}`;
  }
  return all;
}

class KVStorage {
  /** Store a string. Resolves to true once it is durable. */
  static async set(namespace, key, value, metadata = null) {
    return (await call('PUT', pathOf('kv', namespace, key), { value, metadata })).success;
  }

  /** The string, null where there is none. */
  static async get(namespace, key) {
    return (await getOrNull(pathOf('kv', namespace, key)))?.value ?? null;
  }

  static async delete(namespace, key) {
    return (await call('DELETE', pathOf('kv', namespace, key))).success;
  }

  /** `[{name, metadata}]` in the order of their names: all, or the first `limit`. */
  static async list(namespace, prefix = '', limit = undefined) {
    return list('kv', namespace, prefix, limit);
  }
}

class D1Storage {
  /** Run one statement. Resolves to its rows as objects. */
  static async query(namespace, sql, params = []) {
    return (await call('POST', pathOf('d1', namespace, 'query'), { sql, params }, false)).results;
  }

  /** Run statements in one transaction. Resolves to `{success, results, meta}` of all of them. */
  static async exec(namespace, sql, params = []) {
    return call('POST', pathOf('d1', namespace, 'exec'), { sql, params }, false);
  }
}

class R2Storage {
  /** Store bytes, or a string as UTF-8. Resolves to true once they are durable. */
  static async put(namespace, key, content, metadata = null) {
    // Of a view the bytes it shows: by itself `from` would make a byte of each of its numbers.
    const bytes = ArrayBuffer.isView(content)
      ? Buffer.from(content.buffer, content.byteOffset, content.byteLength)
      : Buffer.from(content);
    const encoded = bytes.toString('base64');
    return (await call('PUT', pathOf('r2', namespace, key), { content: encoded, metadata })).success;
  }

  /** A Buffer, null where there is nothing. */
  static async get(namespace, key) {
    const object = await getOrNull(pathOf('r2', namespace, key));
    return object === null ? null : Buffer.from(object.content, 'base64');
  }

  static async delete(namespace, key) {
    return (await call('DELETE', pathOf('r2', namespace, key))).success;
  }

  /** `[{key, size, uploaded}]` in the order of their keys: all, or the first `limit`. */
  static async list(namespace, prefix = '', limit = undefined) {
    return list('r2', namespace, prefix, limit);
  }
}

module.exports = { KVStorage, D1Storage, R2Storage, StorageError };
