// The API reference, drawn from /openapi.json.
import { addCopyButtons, localize, make, origin, prose, wantsKey } from './common.js';

const METHODS = ['get', 'post', 'put', 'patch', 'delete'];
const GROUPS = {
  sessions: ['Sessions', 'Create, show, change and delete sessions.'],
  code: ['Stored code', 'A program stored with a session, for runs that bring none.'],
  runs: ['Running code', 'One run at a time in a session; the rest wait in order.'],
  health: ['Health', 'Whether the server works, and what it is doing.'],
};
// Statuses that every call may answer, shown once at the top.
const EVERYWHERE = {
  400: 'The request is invalid: the error says which field and why.',
  401: 'The server has an API key, and this call came without it.',
  403: 'Refused to every caller, such as a request from a page of another origin.',
  413: 'The body is over 16 MiB.',
  503: 'The server can’t do it now. Retry-After is sent where trying again can help.',
};
const HERE = {
  404: 'No such session.',
  409: 'It exists already, or was deleted meanwhile.',
  413: 'Data, code, env or the body is over its limit.',
  429: 'Too many runs wait, for this session or for the server; Retry-After says when to try again.',
};

let schemas = {};

/** A schema with its reference, if it is one, replaced by what it refers to. */
function resolve(schema) {
  const name = schema?.$ref?.split('/').pop();
  return name ? { name, ...schemas[name] } : schema ?? {};
}

/** A parameter's schema without the null that stands for a parameter left out: no client can send it. */
function withoutNull(schema) {
  const kinds = schema.anyOf?.filter((part) => part.type !== 'null');
  return kinds?.length === 1 ? { ...schema, anyOf: undefined, ...kinds[0] } : schema;
}

/** A type in a few words. */
function typeOf(schema) {
  const resolved = resolve(schema);
  if (resolved.anyOf) return resolved.anyOf.map(typeOf).filter((part, at, all) => all.indexOf(part) === at).join(' or ');
  if (resolved.const !== undefined) return JSON.stringify(resolved.const);
  if (resolved.enum) return resolved.enum.map((value) => JSON.stringify(value)).join(' or ');
  if (resolved.type === 'array') return `list of ${typeOf(resolved.items)}s`.replace(/anythings$/, 'anything');
  if (resolved.type === 'object' && resolved.additionalProperties?.type) return `object of ${resolved.additionalProperties.type}s`;
  return resolved.type ?? (resolved.properties ? 'object' : 'anything');
}

/** The bounds of a value, each in a few words. */
function bounds(schema) {
  const bounds = [];
  for (const part of [schema, ...(schema.anyOf ?? [])]) {
    if (part.exclusiveMinimum !== undefined) bounds.push(`> ${part.exclusiveMinimum}`);
    if (part.minimum !== undefined) bounds.push(`≥ ${part.minimum}`);
    if (part.maximum !== undefined) bounds.push(`≤ ${part.maximum}`);
    if (part.maxLength !== undefined) bounds.push(`at most ${part.maxLength} characters`);
    if (part.pattern) {
      const words = part.pattern.match(/^\^\(?([\w|]+)\)?\$$/);
      bounds.push(words ? words[1].split('|').join(' or ') : part.pattern);
    }
  }
  return bounds;
}

function defaultOf(schema, required) {
  if (required) return make('span', { class: 'required' }, 'required');
  const value = schema.default ?? (schema.type === 'object' ? {} : undefined);
  return value === undefined || value === null ? '' : make('code', {}, JSON.stringify(value));
}

function field(name, schema, required, withDefaults) {
  const resolved = resolve(schema);
  const description = schema.description ?? resolved.description ?? '';
  const limits = bounds(schema);
  const below = resolved.type === 'array' ? resolve(resolved.items) : resolved;
  return make('li', {},
    make('div', { class: 'field-head' }, make('code', { class: 'name' }, name), make('span', { class: 'type' }, typeOf(schema)),
      withDefaults ? defaultOf(schema, required) : null),
    description || limits.length
      ? make('p', {}, ...prose(description), limits.length ? make('span', { class: 'bounds' }, limits.map((limit) => make('code', {}, limit))) : null)
      : null,
    below.properties && below.name ? make('details', {}, make('summary', {}, `fields of ${below.name}`), fields(below, false)) : null);
}

function fields(schema, withDefaults) {
  const required = new Set(schema.required ?? []);
  return make('ul', { class: 'fields' },
    Object.entries(schema.properties ?? {}).map(([name, part]) => field(name, part, required.has(name), withDefaults)));
}

function section(title, ...content) {
  return make('section', { class: 'part' }, make('h4', {}, title), content);
}

// -- examples -------------------------------------------------------------------------------------------------------

/** An example of a value. */
function sample(schema) {
  const resolved = resolve(schema);
  const given = schema.examples?.[0] ?? schema.default;
  if (given !== undefined && given !== null) return given;
  const type = resolved.type ?? resolved.anyOf?.find((part) => part.type !== 'null')?.type;
  return { number: 30, integer: 10, boolean: true, object: {} }[type] ?? 'text';
}

/** An example of a body: its required fields and those with examples, or else its first field. */
function sampleBody(schema) {
  const properties = Object.entries(schema.properties ?? {});
  const chosen = properties.filter(([name, part]) => schema.required?.includes(name) || part.examples);
  return Object.fromEntries((chosen.length ? chosen : properties.slice(0, 1)).map(([name, part]) => [name, sample(part)]));
}

/** A text quoted for the shell. */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** The curl command that makes a call. */
function curl(method, path, operation) {
  const address = `${origin}${path.replaceAll('{session_id}', 'counter')}`;
  const flags = method === 'get' ? '' : `-X ${method.toUpperCase()} `;
  const noBuffer = operation.responses['200']?.content?.['text/event-stream'] ? '-N ' : '';
  const start = `curl ${noBuffer}${flags}`;
  const lines = !flags || start.length + address.length < 50 ? [start + address] : [start.trimEnd(), address];
  if (keyWanted && path.startsWith('/api')) lines.push('-H "Authorization: Bearer $ERA_API_KEY"');
  const body = bodyOf(operation);
  if (body) lines.push('-H "Content-Type: application/json"', `-d ${quoted(JSON.stringify(sampleBody(body)))}`);
  return lines.join(' \\\n  ');
}

function bodyOf(operation) {
  const schema = operation.requestBody?.content?.['application/json']?.schema;
  return schema ? resolve(schema) : null;
}

// -- calls ----------------------------------------------------------------------------------------------------------

function answers(operation) {
  return Object.entries(operation.responses).filter(([status]) => status < 400).map(([status, response]) => {
    const [type, content] = Object.entries(response.content ?? {})[0] ?? [];
    const schema = resolve(content?.schema);
    return make('div', { class: 'answer' },
      make('p', {}, make('b', { class: 'status-code' }, status), ' ', make('code', {}, type ?? 'no body')),
      schema.properties ? make('details', {}, make('summary', {}, 'fields'), fields(schema, false)) : null);
  });
}

function statuses(sentences) {
  return Object.entries(sentences).map(([status, sentence]) => make('div', {}, make('dt', {}, status), make('dd', {}, sentence)));
}

/** The errors of a call: its own in full, those of every call by number only. */
function refusals(path, operation) {
  const listed = Object.keys(operation.responses).filter((status) => status >= 400);
  const here = listed.filter((status) => status in HERE);
  const others = listed.filter((status) => !(status in HERE) && status in EVERYWHERE);
  const sentences = Object.fromEntries(here.map((status) => [status, status === '404' && path.endsWith('/code') && !operation.requestBody
    ? 'No such session, or it stores no code.' : HERE[status]]));
  if (!listed.length) return null;
  return section('Errors', here.length ? make('dl', { class: 'errors' }, statuses(sentences)) : null,
    make('p', { class: 'everywhere' }, `${here.length ? 'And, as' : 'As'} everywhere, ${others.join(', ')}.`));
}

function pathShown(path) {
  return path.split(/(\{[^}]+\})/).map((part) => (part.startsWith('{') ? make('i', {}, part) : part));
}

/** One call: its article, its link in the contents, and the text that the filter searches. */
function call(method, path, operation) {
  const id = `${method}${path.replaceAll(/[^a-z]+/gi, '-')}`.replace(/-$/, '');
  const body = bodyOf(operation);
  const places = operation.parameters ?? [];
  const parameters = places.length
    ? section('Parameters', make('ul', { class: 'fields' }, places.map((parameter) =>
      field(parameter.name, { description: parameter.description ?? (parameter.in === 'path' ? 'In the path.' : ''),
        ...withoutNull(parameter.schema) }, parameter.required, true))))
    : null;
  const description = (operation.description ?? operation.summary ?? '').trim();
  const article = make('article', { class: 'call', id, 'data-call': `${method.toUpperCase()} ${path}` },
    make('h3', {}, make('span', { class: `method ${method}` }, method.toUpperCase()),
      make('a', { class: 'path', href: `#${id}` }, pathShown(path))),
    make('p', { class: 'what' }, prose(description)),
    make('div', { class: 'columns' },
      make('div', {}, parameters, body ? section('Body', fields(body, true)) : null, section('Answer', ...answers(operation)),
        refusals(path, operation)),
      make('div', { class: 'example' }, make('pre', { class: 'shell', 'data-copy': 'curl' }, make('code', {}, curl(method, path, operation))))));
  const link = make('a', { href: `#${id}` }, make('span', { class: `method ${method}` }, method.toUpperCase()),
    make('span', {}, pathShown(path.replace(/^\/api/, '').replace('{session_id}', '{id}'))));
  const names = [...Object.keys(body?.properties ?? {}), ...places.map((parameter) => parameter.name)];
  return { id, article, link, text: [method, path, description, operation.summary, ...names].join(' ').toLowerCase() };
}

// -- the page -------------------------------------------------------------------------------------------------------

const groups = [];

function draw(document_) {
  schemas = document_.components?.schemas ?? {};
  for (const [path, operations] of Object.entries(document_.paths)) {
    for (const method of METHODS.filter((name) => operations[name])) {
      const tag = operations[method].tags?.at(-1) ?? 'other';
      let group = groups.find((known) => known.tag === tag);
      if (!group) groups.push((group = { tag, calls: [] }));
      group.calls.push(call(method, path, operations[method]));
    }
  }
  const order = Object.keys(GROUPS);
  groups.sort((one, other) => (order.indexOf(one.tag) + 99) % 99 - (order.indexOf(other.tag) + 99) % 99);
  const contents = document.querySelector('#contents');
  const calls = document.querySelector('#calls');
  calls.replaceChildren();
  for (const group of groups) {
    const [title, what] = GROUPS[group.tag] ?? [group.tag, ''];
    group.section = make('section', { class: 'group' }, make('header', {}, make('h2', {}, title), make('p', {}, what)),
      group.calls.map((each) => each.article));
    group.entry = make('div', {}, make('h2', { class: 'eyebrow' }, title),
      make('ul', {}, group.calls.map((each) => make('li', {}, each.link))));
    calls.append(group.section);
    contents.append(group.entry);
  }
  calls.removeAttribute('aria-busy');
}

/** Show only the calls that contain all words of a text. */
function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  let matches = 0;
  for (const group of groups) {
    let here = 0;
    for (const each of group.calls) {
      const shown = words.every((word) => each.text.includes(word));
      each.article.hidden = each.link.parentElement.hidden = !shown;
      here += shown;
    }
    group.section.hidden = group.entry.hidden = !here;
    matches += here;
  }
  document.querySelector('.intro').hidden = words.length > 0;
  document.querySelector('#no-match').hidden = matches > 0;
}

/** Highlight in the contents the call that is on the screen. */
function follow() {
  const links = new Map(groups.flatMap((group) => group.calls).map((each) => [each.article, each.link]));
  const seen = new Set();
  const watcher = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) seen[isIntersecting ? 'add' : 'delete'](target);
    const first = [...links.keys()].find((article) => seen.has(article));
    for (const [article, link] of links) link.toggleAttribute('aria-current', article === first);
  }, { rootMargin: '-80px 0px -60% 0px' });
  for (const article of links.keys()) watcher.observe(article);
}

document.querySelector('#origin').textContent = origin;
document.querySelector('#everywhere').append(...statuses(EVERYWHERE));
const keyWanted = await wantsKey();
localize(document.querySelector('.intro'), keyWanted);
const box = document.querySelector('#filter');
try {
  draw(await (await fetch('/openapi.json')).json());
  follow();
} catch (problem) {
  document.querySelector('#calls').replaceChildren(make('p', { class: 'note' }, `openapi.json could not be read: ${problem.message}`));
}
addCopyButtons(document);
box.addEventListener('input', () => filter(box.value));
document.addEventListener('keydown', (event) => {
  if (event.key === '/' && !/input|textarea/i.test(document.activeElement.tagName)) {
    event.preventDefault();
    box.focus();
  } else if (event.key === 'Escape' && document.activeElement === box) {
    box.value = '';
    filter('');
  }
});
if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: 'instant' });
