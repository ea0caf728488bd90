// Shared by both scripts: the server's own address in examples, copy buttons, the health pill.

export const origin = location.origin;
const SHOWN_ORIGIN = 'http://127.0.0.1:8787';
const HEALTH_SECONDS = 5;

/** Create an element with attributes and children. Strings become text nodes, so nothing from a server is ever HTML. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ''));
  return element;
}

/** Nodes for a text in which `backticks` mark code. */
export function prose(text) {
  return text.split(/(`[^`]+`)/).map((part) => (part.startsWith('`') ? make('code', {}, part.slice(1, -1)) : part));
}

/** Whether this server wants an API key. */
export async function wantsKey() {
  try {
    return (await fetch('/api/sessions?limit=1')).status === 401;
  } catch {
    return false;
  }
}

/** Put this server's address into every example, and the header of the API key where the server needs one. */
export function localize(root, keyWanted) {
  for (const code of root.querySelectorAll('pre code')) {
    let text = code.textContent.replaceAll(SHOWN_ORIGIN, origin);
    if (keyWanted && code.closest('[data-era]')) text = `export ERA_API_KEY=…\n${text}`;
    else if (keyWanted) text = text.replace(/^( *)(curl -X \w+ \S+\/api\/\S*)/gm, '$1$2 \\\n$1  -H "Authorization: Bearer $ERA_API_KEY"');
    code.textContent = text;
  }
}

/** Add a copy button to every `pre[data-copy]` below `root`. */
export function addCopyButtons(root) {
  for (const block of root.querySelectorAll('pre[data-copy]')) {
    if (block.parentElement.classList.contains('copyable')) continue;
    const button = make('button', { type: 'button', class: 'copy' }, 'Copy');
    button.addEventListener('click', async () => {
      button.textContent = (await copied(block.textContent)) ? 'Copied' : 'Select and copy';
      setTimeout(() => (button.textContent = 'Copy'), 1600);
    });
    const frame = make('div', { class: 'copyable' }, make('header', {}, make('span', {}, block.dataset.copy || 'Terminal'), button));
    block.replaceWith(frame);
    frame.append(block);
  }
}

/** Copy a text to the clipboard. Returns whether that worked. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers offer the clipboard only in secure contexts, which plain HTTP from another machine isn't.
    const area = make('textarea', { class: 'visually-hidden', 'aria-hidden': 'true' });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }
}

/** Fetch /health now and every few seconds while the page is visible. `show` is called with the answer, or null. */
export function watchHealth(show = () => {}) {
  const pill = document.querySelector('#pill');
  const ask = async () => {
    let health = null;
    try {
      const answer = await fetch('/health', { cache: 'no-store' });
      if (answer.ok) health = await answer.json();
    } catch {
      // Shown as not reachable.
    }
    const state = health?.status === 'ok' ? 'ok' : 'down';
    pill.dataset.state = state;
    pill.querySelector('[data-health=word]').textContent = health ? health.status : 'not reachable';
    for (const place of document.querySelectorAll('[data-health=version]')) place.textContent = health?.version ?? '';
    show(health);
  };
  ask();
  setInterval(() => document.hidden || ask(), HEALTH_SECONDS * 1000);
}
