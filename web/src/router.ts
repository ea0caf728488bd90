/** Where the page is: `#/sessions/demo/files`. Hashes never reach a server, and need no routes there. */

import { signal } from '@preact/signals';

export interface Place {
  parts: string[];
  query: URLSearchParams;
}

function read(): Place {
  const [path = '', query = ''] = location.hash.replace(/^#\/?/, '').split('?', 2);
  const parts = path.split('/').filter(Boolean).map(unescaped);
  return { parts, query: new URLSearchParams(query) };
}

function unescaped(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export const place = signal(read());

export function href(...parts: (string | number)[]): string {
  return `#/${parts.map((part) => encodeURIComponent(part)).join('/')}`;
}

export function go(...parts: (string | number)[]): void {
  location.hash = href(...parts);
}

window.addEventListener('hashchange', () => {
  place.value = read();
});
