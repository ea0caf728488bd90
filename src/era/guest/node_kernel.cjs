'use strict';
// The interpreter of a Node or TypeScript context: a process that stays, and evaluates one cell after the other with
// Node's own REPL. It is started as `node node_kernel.cjs LANGUAGE`; what comes and goes at descriptor 3 is described in
// python_kernel.py, and so is why output is marked.
//
// Evaluating, top-level `await`, `_`, and breaking off are the REPL's. TypeScript is turned into JavaScript by Node's
// own stripTypeScriptTypes. `import` declarations, which a REPL can't have, become the `await import()` that it proposes.
// Cells find the client of the storage (era_storage.js) as programs do: node_require.cjs looks for its name in this file.

// What a cell declares with `const`, `let` or `class` comes before the globals for every module, ours as well. So
// modules that go on while there are cells take the globals that they need at their beginning.
const { Array, Boolean, Buffer, Error, JSON, Object, Promise, String, Symbol, globalThis, process } = global;
const Module = require('node:module');
const net = require('node:net');
const path = require('node:path');
const repl = require('node:repl');
const { PassThrough } = require('node:stream');
const { inspect } = require('node:util');
const { isBoxedPrimitive, isNativeError } = require('node:util').types;
require('./node_require.cjs');
const { withoutImports } = require('./node_imports.cjs');
const { giveStdin, takeStdin } = require('./node_stdin.cjs');

const isTypeScript = process.argv[2] === 'typescript';
const CUT = 64 << 10; // characters that are kept of a stack, and of the text of a result that is too large
process.argv.splice(1);

// What cells might replace, and we need.
const { env, exit, chdir, cwd } = process;
const leave = exit.bind(process);
const goTo = chdir.bind(process);
const here = cwd.bind(process);
const rss = process.memoryUsage.rss.bind(process.memoryUsage);
const outputs = [process.stdout, process.stderr];
const writes = outputs.map((stream) => stream.write.bind(stream));
const { isRawJSON, parse, stringify } = JSON;
const { isArray } = Array;
const home = process.cwd();

const channel = new net.Socket({ fd: 3, readable: true, writable: true });
channel.on('error', () => leave(0));
channel.on('end', () => leave(0));
const toChannel = channel.write.bind(channel);
const send = (kind, payload) => {
  const content = Buffer.from(payload === undefined ? '' : stringify(payload));
  const head = Buffer.alloc(5);
  head.write(kind, 0);
  head.writeUInt32BE(content.length, 1);
  toChannel(Buffer.concat([head, content]));
};

const terminal = new PassThrough();
const shell = repl.start({
  prompt: '',
  input: terminal,
  output: new PassThrough().resume(),
  terminal: false,
  useGlobal: true,
  ignoreUndefined: true,
  breakEvalOnSigint: true,
});
const evaluate = shell.eval.bind(shell);
Object.defineProperty(globalThis, 'repl', { value: undefined, configurable: true, writable: true });

let cell; // the one under way: `{ finish, limit, mark, truncated }`
let count = 0;

// Errors of cells, and of what they left behind: timers, promises. While a cell is under way they are its own.
const failed = (error) => {
  if (cell?.finish) cell.finish(error ?? new Error(String(error)), undefined, true);
  else writes[1](`Uncaught ${shown(error)}\n`);
};
const OURS = /^ {4}at .*(?:sigintHandlersWrap|ContextifyScript|node:repl|node:internal\/vm|node:internal\/modules\/typescript|node_kernel\.cjs)/;
const shown = (error) => {
  try {
    if (!isNativeError(error) || typeof error.stack !== 'string') return inspect(error);
    const lines = error.stack.split('\n');
    const end = lines.findIndex((line) => OURS.test(line));
    return (end < 0 ? lines : lines.slice(0, end)).join('\n');
  } catch {
    return 'an error that cannot be shown';
  }
};
shell._domain.removeAllListeners('error');
shell._domain.on('error', failed);
process.on('uncaughtException', failed);
process.on('unhandledRejection', failed);

// Interrupts. While a script runs, the REPL's own watchdog has SIGINT. Between scripts nobody has it, and then it ends the
// process. So the service says first that it wants a cell interrupted, which is taken whenever a cell waits for something,
// and sends SIGINT where one goes on computing.
const interrupted = () => {
  if (cell?.finish) shell.emit('SIGINT'); // a second one would close the REPL otherwise
};
// Node has a signal from the first listener until the last one goes, and would take SIGINT away from the watchdog. So
// listeners of cells stay where they are, but nothing is listened for while a script runs.
let isScriptRunning = false;
const begin = process.rawListeners('newListener').find((each) => each.name === 'startListeningIfSignal');
if (begin) {
  process.removeListener('newListener', begin);
  process.on('newListener', (name) => {
    if (name !== 'SIGINT' || !isScriptRunning) begin(name);
  });
}
const setListeners = (ours) => {
  // All of them, since a watchdog has taken away what Node believes to have.
  const others = process.rawListeners('SIGINT').filter((each) => each !== interrupted);
  process.removeAllListeners('SIGINT');
  for (const each of [...ours, ...others]) process.on('SIGINT', each);
};
const listen = () => {
  isScriptRunning = false;
  setListeners([interrupted]);
};
const leaveToWatchdog = () => {
  isScriptRunning = true;
  setListeners([]);
};
listen();
// The REPL calls it with the watchdog on duty, right before the script begins and right after its end.
let watched = () => {};
shell._setRawMode = () => watched();

const result = (data, main) => {
  if (!cell) return;
  const more = main ? { metadata: {}, main, execution_count: count } : { metadata: {}, main };
  let bundle = { data, ...more };
  let size = Buffer.byteLength(stringify(bundle));
  if (size > cell.limit) {
    cell.truncated = true;
    bundle = { data: { 'text/plain': String(data['text/plain'] ?? '').slice(0, CUT) }, ...more };
    size = Buffer.byteLength(stringify(bundle));
  }
  if (size > cell.limit) return;
  cell.limit -= size;
  for (const write of writes) write(cell.mark);
  send('P', { ...bundle, marked: [1, 2] });
};
// Whether an object is none that has a value for each MIME type: a list, a promise, or what JSON has in another form.
const isOther = (value) =>
  isArray(value) ||
  isBoxedPrimitive(value) ||
  isRawJSON?.(value) ||
  typeof value.then === 'function' ||
  typeof value.toJSON === 'function';
// The MIME bundle of a value: its own, if it has one as notebooks know it, else what the REPL would print.
const bundleOf = (value) => {
  const own = value?.[Symbol.for('Jupyter.display')];
  if (typeof own === 'function') {
    const bundle = own.call(value);
    if (bundle && typeof bundle === 'object' && !isOther(bundle)) return bundle;
  }
  return { 'text/plain': inspect(value, { showProxy: true }) };
};
globalThis.display = (value) => result(bundleOf(value), false);
Object.defineProperty(globalThis, 'display', { enumerable: false });

const javaScript = (code) => {
  if (isTypeScript) {
    try {
      code = Module.stripTypeScriptTypes(code, { mode: 'strip' });
    } catch (error) {
      if (error.code !== 'ERR_UNSUPPORTED_TYPESCRIPT_SYNTAX') throw error;
      code = Module.stripTypeScriptTypes(code, { mode: 'transform' });
    }
  }
  return withoutImports(code);
};

// Evaluates code as the REPL does; the callback gets an error or a value, once.
const run = (code, done) => {
  let ended = false;
  cell.finish = (error, value, isError) => {
    if (ended) return;
    ended = true;
    cell.finish = undefined;
    done(isError, error, value);
  };
  try {
    const script = javaScript(code);
    watched = () => {
      watched = () => {};
      send('B');
    };
    leaveToWatchdog();
    evaluate(script, shell.context, `cell-${count}`, (error, value) => {
      listen();
      cell?.finish?.(error?.err ?? error, value, Boolean(error));
    });
  } catch (error) {
    cell.finish?.(error, undefined, true);
  } finally {
    listen();
  }
};

const nameOf = (error) => String(error?.name ?? typeof error).slice(0, CUT);
const valueOf = (error) => {
  try {
    return String(isNativeError(error) ? error.message : inspect(error));
  } catch {
    return '';
  }
};

const execute = (request) => {
  const before = Object.keys(request.env).map((name) => [name, env[name]]);
  const directory = here();
  count += 1;
  cell = { limit: request.limit, mark: request.event_mark, truncated: false };
  const end = (isError, error, value) => {
    let told = null;
    if (isError) {
      const stack = shown(error);
      told = { name: nameOf(error), value: valueOf(error).slice(0, CUT), traceback: stack.slice(0, CUT) };
      writes[1](`Uncaught ${stack}\n`);
      if (!shell.underscoreErrAssigned) shell.lastError = error;
    } else if (value !== undefined) {
      if (!shell.underscoreAssigned) shell.last = value;
      try {
        result(bundleOf(value), true);
      } catch (problem) {
        writes[1](`The value can't be shown: ${shown(problem)}\n`);
      }
    }
    const { truncated } = cell;
    cell = undefined;
    if (request.stdin) takeStdin();
    for (const [name, previous] of before) {
      if (previous === undefined) delete env[name];
      else env[name] = previous;
    }
    if (request.cwd) {
      try {
        goTo(directory);
      } catch {
        // It is gone.
      }
    }
    Promise.all(writes.map((write) => new Promise((resolve) => write(request.mark, resolve)))).then(() =>
      send('D', {
        error: told,
        exit_code: isError ? 1 : 0,
        execution_count: count,
        marked: [1, 2],
        results_truncated: truncated,
        ends: false,
        interrupted: isError && error?.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED',
        memory_bytes: rss(),
      }),
    );
  };
  try {
    Object.assign(env, request.env);
    if (request.cwd) goTo(path.join(home, request.cwd));
    Object.defineProperty(process, 'stdin', {
      value: giveStdin(request.stdin),
      configurable: true,
      writable: true,
      enumerable: true,
    });
    const own = Module.createRequire(path.join(here(), 'cell.js'));
    globalThis.require = shell.context.require = own;
  } catch (error) {
    end(true, error);
    return;
  }
  run(request.code, end);
};

let received = Buffer.alloc(0);
channel.on('data', (piece) => {
  received = received.length ? Buffer.concat([received, piece]) : piece;
  while (received.length >= 5) {
    const size = received.readUInt32BE(1);
    if (received.length < 5 + size) return;
    const kind = String.fromCharCode(received[0]);
    const payload = received.subarray(5, 5 + size).toString();
    received = received.subarray(5 + size);
    if (kind === 'X') execute(parse(payload));
    else if (kind === 'I') interrupted();
  }
});
if (isTypeScript) Module.stripTypeScriptTypes('enum A { B }', { mode: 'transform' });
send('Y', { kernel: `Node ${process.version}`, hears: true, memory_bytes: rss() });
