/** Light, dark, or as the system says. */

import { signal } from '@preact/signals';

const KEY = 'era-theme';
export type Theme = 'auto' | 'light' | 'dark';

const system = matchMedia('(prefers-color-scheme: dark)');
const kept = localStorage.getItem(KEY);
export const theme = signal<Theme>(kept === 'light' || kept === 'dark' ? kept : 'auto');

/** Have the page in the colours that are to be in force. */
function show(): void {
  document.documentElement.dataset.theme = theme.value === 'auto' ? (system.matches ? 'dark' : 'light') : theme.value;
}

system.addEventListener('change', show);

export function setTheme(next: Theme): void {
  theme.value = next;
  if (next === 'auto') localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, next);
  show();
}

export function nextTheme(): void {
  setTheme(theme.value === 'auto' ? 'light' : theme.value === 'light' ? 'dark' : 'auto');
}
