/** Small parts that every page is made of. */

import type { Signal } from '@preact/signals';
import { type ButtonHTMLAttributes, Component, type ComponentChildren } from 'preact';
import { useEffect, useId, useRef, useState } from 'preact/hooks';
import { exactly, ago as inWords, plain } from '../format.ts';
import { Icon } from './icons.tsx';

type ButtonProps = ButtonHTMLAttributes<HTMLButtonElement> & {
  kind?: 'primary' | 'danger' | 'quiet';
  icon?: string;
  busy?: boolean;
};

export function Button({ kind, icon, busy, children, class: extra, ...rest }: ButtonProps) {
  const name = ['button', kind, !children && 'icon-only', extra].filter(Boolean).join(' ');
  return (
    <button type="button" {...rest} class={name} disabled={busy || rest.disabled} aria-busy={busy}>
      {icon && <Icon name={icon} />}
      {children}
    </button>
  );
}

/** A form that is sent by a call of ours, not by the browser. */
export function Form({
  onSubmit,
  class: name = 'stack',
  children,
}: {
  onSubmit: () => void;
  class?: string;
  children: ComponentChildren;
}) {
  return (
    <form
      class={name}
      onSubmit={(event) => {
        event.preventDefault();
        onSubmit();
      }}
    >
      {children}
    </form>
  );
}

/** A part of the page that shows why it can't be shown where that fails, while the others go on. */
export class Boundary extends Component<{ children: ComponentChildren }, { error?: Error | undefined }> {
  static override getDerivedStateFromError(error: Error) {
    return { error };
  }

  override render() {
    if (!this.state.error) return this.props.children;
    return <Problem error={this.state.error} retry={() => this.setState({ error: undefined })} />;
  }
}

/** An error with what to do about it, as the API says it. */
export function Problem({ error, retry }: { error: Error | undefined; retry?: (() => void) | undefined }) {
  if (!error) return null;
  const hint = (error as { hint?: string }).hint;
  const details = (error as { details?: unknown }).details;
  const fields = Array.isArray(details) ? (details as { field?: string; problem?: string }[]) : [];
  return (
    <div class="problem" role="alert">
      <Icon name="alert" />
      <div>
        <p class="problem-text">{error.message}</p>
        {hint && <p class="soft">{hint}</p>}
        {fields.length > 1 && (
          <ul>
            {fields.map((each) => (
              <li key={each.field}>
                <code>{each.field}</code> {each.problem}
              </li>
            ))}
          </ul>
        )}
      </div>
      {retry && <Button onClick={retry}>Try again</Button>}
    </div>
  );
}

export function Empty({ icon, title, children }: { icon: string; title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <Icon name={icon} size={28} />
      <h2>{title}</h2>
      {children}
    </div>
  );
}

/** Grey lines in the place of what is being loaded, so that nothing jumps. */
export function Waiting({ lines = 4 }: { lines?: number }) {
  return (
    <div class="waiting" role="status" aria-label="Loading">
      {Array.from({ length: lines }, (_, line) => (
        <span key={line} class={`line-${line % 3}`} />
      ))}
    </div>
  );
}

export function Ago({ time }: { time: string }) {
  return time ? (
    <time dateTime={time} title={exactly(time)}>
      {inWords(time)}
    </time>
  ) : (
    <span class="soft">never</span>
  );
}

/** An untrusted name. */
export function Name({ children }: { children: string }) {
  return <bdi>{plain(children)}</bdi>;
}

const TONES: { [status: string]: string } = {
  ok: 'good',
  ready: 'good',
  not_ready: 'wait',
  silent: 'bad',
  dead: 'bad',
  done: 'good',
  completed: 'good',
  running: 'live',
  live: 'live',
  exited: 'calm',
  pending: 'wait',
  failed: 'bad',
  timeout: 'bad',
  oom: 'bad',
  killed: 'bad',
  disk_full: 'bad',
  lost: 'bad',
  expired: 'wait',
  deleted: 'wait',
};

export function Status({ children }: { children: string }) {
  return (
    <span class={`status ${TONES[children] ?? 'calm'}`}>
      <span class="dot" />
      {children.replace('_', ' ')}
    </span>
  );
}

type FieldProps = {
  label: string;
  hint?: ComponentChildren;
  children: (id: string, described: string) => ComponentChildren;
  inline?: boolean;
};

/** A labelled control; the hint describes it. */
export function Field({ label, hint, children, inline }: FieldProps) {
  const id = useId();
  return (
    <div class={inline ? 'field inline' : 'field'}>
      {inline ? children(id, `${id}-hint`) : null}
      <label for={id}>{label}</label>
      {inline ? null : children(id, `${id}-hint`)}
      <p class="hint" id={`${id}-hint`}>
        {hint}
      </p>
    </div>
  );
}

export function TextField(props: {
  label: string;
  hint?: ComponentChildren;
  value: string;
  onText: (text: string) => void;
  type?: 'text' | 'number' | 'password';
  placeholder?: string;
  maxLength?: number;
  min?: number;
  max?: number;
  step?: string;
}) {
  const { label, hint, onText, type = 'text', ...rest } = props;
  return (
    <Field label={label} hint={hint}>
      {(id, described) => (
        <input
          {...rest}
          type={type as 'text'}
          id={id}
          autocomplete="off"
          spellcheck={false}
          aria-describedby={described}
          onInput={(event) => onText(event.currentTarget.value)}
        />
      )}
    </Field>
  );
}

export function TextArea({
  label,
  hint,
  value,
  onText,
  rows = 4,
  placeholder,
}: {
  label: string;
  hint?: ComponentChildren;
  value: string;
  onText: (text: string) => void;
  rows?: number;
  placeholder?: string;
}) {
  return (
    <Field label={label} hint={hint}>
      {(id, described) => (
        <textarea
          id={id}
          rows={rows}
          spellcheck={false}
          value={value}
          placeholder={placeholder}
          aria-describedby={described}
          onInput={(event) => onText(event.currentTarget.value)}
        />
      )}
    </Field>
  );
}

export function Check({
  label,
  hint,
  checked,
  disabled,
  onChange,
}: {
  label: string;
  hint?: ComponentChildren;
  checked: boolean;
  disabled?: boolean;
  onChange: (checked: boolean) => void;
}) {
  return (
    <Field label={label} hint={hint} inline>
      {(id, described) => (
        <input
          type="checkbox"
          id={id}
          checked={checked}
          disabled={disabled}
          aria-describedby={described}
          onChange={(event) => onChange(event.currentTarget.checked)}
        />
      )}
    </Field>
  );
}

/** A check for each name, of which any may be chosen. */
export function Choices({ of, chosen }: { of: [name: string, hint: string][]; chosen: Signal<Set<string>> }) {
  return of.map(([name, hint]) => (
    <Check
      key={name}
      label={name}
      hint={hint}
      checked={chosen.value.has(name)}
      onChange={(checked) => {
        const others = [...chosen.value].filter((each) => each !== name);
        chosen.value = new Set(checked ? [...others, name] : others);
      }}
    />
  ));
}

export function Select({
  label,
  value,
  options,
  onChange,
  hidden,
  hint,
}: {
  label: string;
  value: string;
  options: [value: string, text: string][];
  onChange: (value: string) => void;
  hidden?: boolean;
  hint?: ComponentChildren;
}) {
  const id = useId();
  return (
    <div class={hidden ? 'field bare' : 'field'}>
      <label for={id} class={hidden ? 'unseen' : ''}>
        {label}
      </label>
      <select id={id} value={value} onChange={(event) => onChange(event.currentTarget.value)}>
        {options.map(([each, text]) => (
          <option key={each} value={each}>
            {text}
          </option>
        ))}
      </select>
      {!hidden && <p class="hint">{hint}</p>}
    </div>
  );
}

/** Copy a text; whether that worked. Browsers offer the clipboard only in secure contexts, which plain HTTP isn't. */
async function copied(text: string, beside: HTMLElement): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement('textarea');
    area.className = 'unseen';
    area.value = text;
    beside.after(area); // behind an open dialog nothing can be selected
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    beside.focus();
    return done;
  }
}

export function Copy({ text, label = 'Copy' }: { text: string; label?: string }) {
  const [done, setDone] = useState<boolean | undefined>();
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined);
  useEffect(() => () => clearTimeout(timer.current), []);
  return (
    <Button
      kind="quiet"
      icon={done ? 'check' : done === false ? 'alert' : 'copy'}
      aria-label={label}
      title={done === false ? 'The browser doesn’t copy it: select it' : label}
      onClick={async (event) => {
        setDone(await copied(text, event.currentTarget));
        clearTimeout(timer.current);
        timer.current = setTimeout(() => setDone(undefined), 1500);
      }}
    />
  );
}

/** Names and values, such as the fields of a record. */
export function Facts({ facts }: { facts: [name: string, value: ComponentChildren][] }) {
  return (
    <dl class="facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}
