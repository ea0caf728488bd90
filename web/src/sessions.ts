/** The list of sessions, loaded page by page and kept: thousands fit, and a search in them needs no request. */

import { signal } from '@preact/signals';
import { call } from './api.ts';
import type { Page, Session } from './types.ts';

const PAGE = 200;
const LARGER_PAGE = 1000;
const MOST = 50_000;
// Data is left out: it may be a mebibyte a session.
const FIELDS = 'id,created_at,last_run_at,language,metadata,version,file_count,total_size_bytes,status,expires_at';

export type ListedSession = Pick<
  Session,
  | 'id'
  | 'created_at'
  | 'last_run_at'
  | 'language'
  | 'metadata'
  | 'version'
  | 'file_count'
  | 'total_size_bytes'
  | 'status'
  | 'expires_at'
>;

export interface Filters {
  language: string;
  status: string;
  /** `KEY=VALUE` */
  label: string;
}

export const NO_FILTERS: Filters = { language: '', status: '', label: '' };

export interface Listed {
  sessions: ListedSession[];
  complete: boolean;
  loading: boolean;
  error: Error | undefined;
}

export const listed = signal<Listed>({ sessions: [], complete: false, loading: true, error: undefined });

/** Sessions that a list has shown. */
export function sessionsKnown(): ListedSession[] {
  return listed.value.sessions;
}

let generation = 0;

function queryOf(filters: Filters, cursor: string | null): Record<string, string | number | null> {
  const query: Record<string, string | number | null> = { limit: cursor ? LARGER_PAGE : PAGE, cursor, fields: FIELDS };
  if (filters.language) query.language = filters.language;
  if (filters.status) query.status = filters.status;
  const [name = '', value = ''] = splitLabel(filters.label);
  if (name) query[`metadata.${name}`] = value;
  return query;
}

/** The two parts of `KEY=VALUE`; nothing while it isn't whole. */
export function splitLabel(label: string): [string, string] | [] {
  const at = label.indexOf('=');
  return at > 0 ? [label.slice(0, at).trim(), label.slice(at + 1).trim()] : [];
}

/** Load all that pass the filters, the newest first. What is shown stays until the first page is there. */
export async function loadSessions(filters: Filters): Promise<void> {
  const mine = ++generation;
  listed.value = { ...listed.value, loading: true, error: undefined };
  const sessions: ListedSession[] = [];
  let cursor: string | null = null;
  try {
    do {
      const page: Page & { sessions: ListedSession[] } = await call('/api/sessions', {
        query: queryOf(filters, cursor),
      });
      if (mine !== generation) return;
      sessions.push(...page.sessions);
      cursor = page.next_cursor;
      const complete = cursor === null;
      listed.value = { sessions: [...sessions], complete, loading: !complete, error: undefined };
    } while (cursor && sessions.length < MOST);
    listed.value = { ...listed.value, sessions, complete: cursor === null, loading: false };
  } catch (error) {
    if (mine === generation) listed.value = { ...listed.value, loading: false, error: error as Error };
  }
}

/** Look at the newest page again, and put what is new or changed into the list. */
export async function refreshSessions(filters: Filters): Promise<void> {
  const mine = generation;
  if (listed.value.loading || listed.value.error) return;
  const page: Page & { sessions: ListedSession[] } = await call('/api/sessions', { query: queryOf(filters, null) });
  if (mine !== generation || listed.value.loading) return;
  const old = listed.value.sessions;
  if (JSON.stringify(old.slice(0, page.count)) === JSON.stringify(page.sessions)) return;
  const fresh = new Set(page.sessions.map((session) => session.id));
  // There may be more new ones than a page holds.
  if (page.next_cursor && !old.some((each) => fresh.has(each.id))) return loadSessions(filters);
  const oldest = page.sessions.at(-1)?.created_at ?? '';
  const rest = page.next_cursor ? old.filter((each) => !fresh.has(each.id) && each.created_at <= oldest) : [];
  listed.value = { ...listed.value, sessions: [...page.sessions, ...rest] };
}

export function forgetSession(id: string): void {
  listed.value = { ...listed.value, sessions: listed.value.sessions.filter((session) => session.id !== id) };
}

/** Whether a session has all words of a search, in its id, language or labels. */
export function isFound(session: ListedSession, search: string): boolean {
  if (!search) return true;
  const text = `${session.id} ${session.language} ${JSON.stringify(session.metadata)}`.toLowerCase();
  return search
    .toLowerCase()
    .split(/\s+/)
    .every((word) => text.includes(word));
}
