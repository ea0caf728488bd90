// The beginning of the docs page: the server's status, and the box to try it. reference.js draws the rest.
import { make, wantsKey, watchHealth } from './common.js';

// Names of languages that are more than the id with a capital letter.
const NAMES = { typescript: 'TypeScript' };

const EXAMPLES = {
  python: `import os, socket, sys

print("Python", sys.version.split()[0])
print("user:", os.getuid(), "files:", os.listdir())

try:
    socket.create_connection(("192.0.2.1", 80))
except OSError as error:
    print("no way out:", error.strerror)

print(sum(n * n for n in range(100_000)))
`,
  node: `import os from 'node:os';
const fs = require('node:fs'); // both styles work

console.log('Node', process.version, 'on', os.hostname());
console.log('files:', fs.readdirSync('.'));

const started = Date.now();
await new Promise((done) => setTimeout(done, 50));
console.log('waited', Date.now() - started, 'ms');
`,
  typescript: `enum Light { Red, Amber, Green }

interface Lamp {
  name: string;
  light: Light;
}

const lamps: Lamp[] = [
  { name: 'north', light: Light.Green },
  { name: 'east', light: Light.Red },
];
for (const { name, light } of lamps) {
  console.log(name, 'is', Light[light].toLowerCase());
}
`,
  deno: `const started: number = performance.now();
console.log('Deno', Deno.version.deno, 'in', Deno.cwd());
console.log('files:', [...Deno.readDirSync('.')].map((entry) => entry.name));

try {
  await fetch('https://192.0.2.1');
} catch (error) {
  console.log('no way out:', error.message);
}
console.log('took', Math.round(performance.now() - started), 'ms');
`,
  go: `package main

import (
	"fmt"
	"runtime"
	"sync"
)

func main() {
	var group sync.WaitGroup
	squares := make([]int, 10)
	for n := range squares {
		group.Go(func() { squares[n] = n * n })
	}
	group.Wait()
	fmt.Println(runtime.Version(), squares)
}
`,
};

const form = document.querySelector('#bench');
const code = document.querySelector('#code');
const key = document.querySelector('#key');
const keyRow = document.querySelector('#key-row');
const verdict = document.querySelector('#verdict');
const streams = document.querySelector('#streams');
const run = document.querySelector('#run');

/** The name of a language for people. */
function inWords(name) {
  return NAMES[name] ?? name[0].toUpperCase() + name.slice(1);
}

// -- status ---------------------------------------------------------------------------------------------------------

/** Fill the place on the page that shows this value of /health. */
function place(name, ...content) {
  document.querySelector(`dd[data-health=${name}], dd [data-health=${name}]`).replaceChildren(...content);
}

function showHealth(health) {
  place('status', make('span', { class: `word ${health ? 'good' : 'bad'}` }, health ? health.status : 'not reachable'));
  if (!health) return;
  place('languages', health.languages.map(inWords).join(', '));
  offer(health.languages);
  const { live, busy, ready } = health.sandboxes;
  place('sandboxes', `${live} in sessions, ${busy} busy, ${ready} ready`);
  const { cgroup, rlimits, summary } = health.isolation;
  const bounds = [];
  if (cgroup?.memory_bytes) bounds.push(`${cgroup.memory_bytes / 2 ** 20} MiB memory`);
  else if (rlimits?.RLIMIT_DATA) bounds.push(`${Math.round(rlimits.RLIMIT_DATA / 2 ** 20)} MiB memory a process`);
  if (rlimits?.RLIMIT_NPROC) bounds.push(`${rlimits.RLIMIT_NPROC} processes`);
  if (cgroup?.cpus) bounds.push(`${cgroup.cpus} cpu${cgroup.cpus === 1 ? '' : 's'}`);
  place('limits', bounds.join(', ') || 'see /health');
  place('isolation', make('ul', { class: 'chips' }, summary.split('; ').map((part) => make('li', {}, part))));
}

// -- the box --------------------------------------------------------------------------------------------------------

const drafts = { ...EXAMPLES };
let language = 'python';

/** Switch to another language; what was typed for this one is kept. */
function choose(chosen) {
  drafts[language] = code.value || drafts[language];
  language = chosen;
  code.value = drafts[language] ?? '';
}

/** Add a tab for each language that has none yet. */
function offer(languages) {
  const tabs = document.querySelector('.tabs');
  for (const name of languages) {
    if (tabs.querySelector(`input[value="${name}"]`)) continue;
    const input = make('input', { type: 'radio', name: 'language', value: name });
    input.checked = name === language;
    tabs.append(make('label', {}, input, make('span', {}, inWords(name))));
  }
}

/** The element that shows stdout or stderr; null where it is empty. */
function stream(name, text, truncated) {
  if (!text) return null;
  return make('div', { class: `stream ${name}` }, make('h3', {}, name),
    make('pre', {}, text), truncated ? make('p', { class: 'hint' }, 'There was more; the rest is cut off.') : null);
}

function showRun(answer, milliseconds) {
  const good = answer.status === 'ok';
  verdict.replaceChildren(
    make('span', { class: `word ${good ? 'good' : 'bad'}` }, answer.status),
    make('span', {}, 'exit code ', make('b', {}, String(answer.exit_code))),
    make('span', {}, 'ran ', make('b', {}, answer.duration)),
    make('span', { class: 'aside' }, `answered in ${milliseconds} ms`));
  const shown = ['stdout', 'stderr']
    .map((name) => stream(name, answer[name], answer[`${name}_truncated`])).filter((part) => part !== null);
  streams.replaceChildren(...(shown.length ? shown : [make('p', { class: 'hint' }, 'It wrote nothing.')]));
}

function showError(title, sentence, hint) {
  verdict.replaceChildren(make('span', { class: 'word bad' }, title), make('span', {}, sentence));
  streams.replaceChildren(make('p', { class: 'hint' }, hint ?? ''));
}

async function execute() {
  const headers = { 'Content-Type': 'application/json' };
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  run.disabled = true;
  form.dataset.running = '';
  verdict.replaceChildren(make('span', { class: 'idle' }, 'Running…'));
  const started = performance.now();
  try {
    const response = await fetch('/api/execute', {
      method: 'POST', headers, body: JSON.stringify({ language, code: code.value }),
    });
    const answer = await response.json();
    if (response.ok) showRun(answer, Math.round(performance.now() - started));
    else {
      showError(String(response.status), answer.error, answer.hint);
      if (response.status === 401) askForKey(true);
    }
  } catch {
    showError('no answer', 'The server could not be reached.', 'Is it still running?');
  } finally {
    run.disabled = false;
    delete form.dataset.running;
  }
}

function askForKey(focus) {
  keyRow.hidden = false;
  if (focus) key.focus();
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  execute();
});
form.addEventListener('change', (event) => {
  if (event.target.name === 'language') choose(event.target.value);
});
code.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!run.disabled) execute();
  }
});

code.value = drafts[language];
watchHealth(showHealth);
if (await wantsKey()) askForKey(false);
