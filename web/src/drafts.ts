/** What was typed and not saved yet. It outlives a change of the page, an error, and a server that is away. */

const drafts = new Map<string, string>();

export function draft(name: string): string | undefined {
  return drafts.get(name);
}

export function keepDraft(name: string, text: string): void {
  drafts.set(name, text);
}

export function dropDraft(name: string): void {
  drafts.delete(name);
}

window.addEventListener('beforeunload', (event) => {
  if (drafts.size) event.preventDefault();
});
