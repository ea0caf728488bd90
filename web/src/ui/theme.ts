/** Light, dark, or as the system says. */

import { signal } from '@preact/signals';

const KEY = 'era-theme';
export type Theme = 'auto' | 'light' | 'dark';

export const theme = signal<Theme>((document.documentElement.dataset.theme as Theme | undefined) ?? 'auto');

export function setTheme(next: Theme): void {
  theme.value = next;
  if (next === 'auto') {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(KEY);
  } else {
    document.documentElement.dataset.theme = next;
    localStorage.setItem(KEY, next);
  }
}

export function nextTheme(): void {
  setTheme(theme.value === 'auto' ? 'light' : theme.value === 'light' ? 'dark' : 'auto');
}

/** Whether dark colours are in force. */
export function isDark(): boolean {
  return theme.value === 'dark' || (theme.value === 'auto' && matchMedia('(prefers-color-scheme: dark)').matches);
}
