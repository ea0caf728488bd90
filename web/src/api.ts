/** Calls of this server's API: the key, errors as they are answered, and whether the server is there at all. */

import { signal } from '@preact/signals';
import { parsed } from './numbers.ts';
import type { Health } from './types.ts';

const KEY = 'era-key';
const WATCH_MS = 5000;
const AWAY_MS = 1000;

/** An error that the server answered. */
export class ApiError extends Error {
  readonly status: number;
  readonly code: string;
  readonly hint: string;
  readonly details: unknown;

  constructor(status: number, body: { error?: string; code?: string; hint?: string; details?: unknown }) {
    super(body.error ?? `The server answered ${status}.`);
    this.status = status;
    this.code = body.code ?? 'unknown';
    this.hint = body.hint ?? '';
    this.details = body.details;
  }
}

/** There was no answer. */
export class Unreachable extends Error {
  readonly hint = 'What you typed is kept. This page looks for the server every second.';

  constructor() {
    super('The server can’t be reached.');
  }
}

export const health = signal<Health | null>(null);
export const away = signal(false);
/** Counts how often the server has come back, for whoever must load again. */
export const returns = signal(0);
export const keyWanted = signal(false);
/** It lasts as long as the tab, is in no URL, and is sent to this server only. */
export const apiKey = signal(sessionStorage.getItem(KEY) ?? '');

export function useKey(key: string): void {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  apiKey.value = key;
  keyWanted.value = false;
  returns.value++;
}

export type Query = { [name: string]: string | number | boolean | undefined | null };

/** A path with its query; parts of the path must be escaped already, see `at`. */
export function withQuery(path: string, query: Query = {}): string {
  const pairs = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== '');
  const text = new URLSearchParams(pairs.map(([name, value]) => [name, String(value)])).toString();
  return text ? `${path}?${text}` : path;
}

/** The path of a session's part: `at('demo', 'runs', id)`. */
export function at(session: string, ...parts: (string | number)[]): string {
  return ['/api/sessions', encodeURIComponent(session), ...parts.map((part) => encodeURIComponent(part))].join('/');
}

/** The path of a session's file: slashes stay. */
export function fileAt(session: string, path: string, version?: number): string {
  const escaped = path.split('/').map(encodeURIComponent).join('/');
  const below = version === undefined ? at(session, 'files') : at(session, 'versions', version, 'files');
  return `${below}/${escaped}`;
}

export interface Sent {
  method?: string;
  json?: unknown;
  body?: BodyInit;
  headers?: Record<string, string>;
  signal?: AbortSignal;
  query?: Query;
}

/** Send a request; the response is one of success. Throws ApiError, Unreachable, or the AbortError of `signal`. */
export async function send(path: string, sent: Sent = {}): Promise<Response> {
  const headers: Record<string, string> = { ...sent.headers };
  if (apiKey.value) headers.Authorization = `Bearer ${apiKey.value}`;
  let body = sent.body;
  if (sent.json !== undefined) {
    headers['Content-Type'] = 'application/json';
    body = JSON.stringify(sent.json);
  }
  let response: Response;
  try {
    response = await fetch(withQuery(path, sent.query), {
      method: sent.method ?? (body === undefined ? 'GET' : 'POST'),
      headers,
      body,
      signal: sent.signal,
      cache: 'no-store',
    });
  } catch (error) {
    if (sent.signal?.aborted) throw error;
    lost();
    throw new Unreachable();
  }
  if (!response.ok) {
    const answer = await response.json().catch(() => ({}));
    if (response.status === 401) keyWanted.value = true;
    throw new ApiError(response.status, answer);
  }
  return response;
}

/** Send a request and read the JSON of its answer. */
export async function call<T>(path: string, sent: Sent = {}): Promise<T> {
  const response = await send(path, sent);
  let text: string;
  try {
    text = await response.text();
  } catch (error) {
    if (sent.signal?.aborted) throw error;
    lost();
    throw new Unreachable();
  }
  return parsed(text) as T;
}

export interface ServerEvent {
  id: string;
  event: string;
  data: { type: string } & Record<string, unknown>;
}

/** The events of a stream, until it ends. Throws Unreachable where it breaks off. */
export async function* events(response: Response): AsyncGenerator<ServerEvent> {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let event = { id: '', event: 'message', data: '' };
  try {
    while (true) {
      let piece: ReadableStreamReadResult<string>;
      try {
        piece = await reader.read();
      } catch (error) {
        if ((error as Error).name === 'AbortError') throw error;
        lost();
        throw new Unreachable();
      }
      if (piece.done) return;
      const lines = (rest + piece.value).split('\n');
      rest = lines.pop() ?? '';
      for (const line of lines) {
        if (line === '' || line === '\r') {
          if (event.data) yield { id: event.id, event: event.event, data: parsed(event.data) as ServerEvent['data'] };
          event = { id: event.id, event: 'message', data: '' };
        } else if (!line.startsWith(':')) {
          const colon = line.indexOf(':');
          const name = line.slice(0, colon);
          const value = line
            .slice(colon + 1)
            .replace(/^ /, '')
            .replace(/\r$/, '');
          if (name === 'data') event.data += event.data ? `\n${value}` : value;
          else if (name === 'event' || name === 'id') event[name] = value;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

/** Download what a call answers. Without a key the browser does it by itself, so it may be of any size. */
export async function download(path: string, name: string, query?: Query): Promise<void> {
  const link = document.createElement('a');
  link.download = name;
  if (!apiKey.value) {
    link.href = withQuery(path, query);
    link.click();
    return;
  }
  const content = await (await send(path, { query })).blob();
  link.href = URL.createObjectURL(content);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

let watch: ReturnType<typeof setTimeout> | undefined;

function lost(): void {
  if (away.value) return;
  away.value = true;
  look(AWAY_MS);
}

function look(milliseconds: number): void {
  clearTimeout(watch);
  watch = setTimeout(watchHealth, milliseconds);
}

/** Ask for the server's health now and again; with a hidden page, only while the server is away. */
export async function watchHealth(): Promise<void> {
  if (document.hidden && !away.value) {
    look(WATCH_MS);
    return;
  }
  try {
    const response = await fetch('/health', { cache: 'no-store' });
    if (!response.ok) throw new Error(String(response.status));
    health.value = await response.json();
    if (away.value) {
      away.value = false;
      returns.value++;
    }
  } catch {
    away.value = true;
  }
  look(away.value ? AWAY_MS : WATCH_MS);
}
