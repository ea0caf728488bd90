/** Dialogs, a question before what can't be undone, and short messages. */

import { signal } from '@preact/signals';
import type { ComponentChildren } from 'preact';
import { useEffect, useRef } from 'preact/hooks';
import { useAction } from '../hooks.ts';
import { Button, Problem } from './basics.tsx';
import { Icon } from './icons.tsx';

export function Dialog({
  title,
  children,
  onClose,
  wide,
}: {
  title: string;
  children: ComponentChildren;
  onClose: () => void;
  wide?: boolean;
}) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const element = dialog.current;
    const before = document.activeElement as HTMLElement | null;
    element?.showModal();
    // Otherwise the button that closes the dialog would have the focus.
    element?.querySelector<HTMLElement>('input, select, textarea, footer .button')?.focus();
    return () => {
      element?.close();
      before?.focus();
    };
  }, []);
  return (
    <dialog
      ref={dialog}
      class={wide ? 'wide' : ''}
      aria-label={title}
      onCancel={(event) => {
        event.preventDefault();
        onClose();
      }}
      onMouseDown={(event) => {
        if (event.target === dialog.current) onClose();
      }}
    >
      <div class="dialog-body">
        <header>
          <h2>{title}</h2>
          <Button kind="quiet" icon="close" aria-label="Close" onClick={onClose} />
        </header>
        {children}
      </div>
    </dialog>
  );
}

interface Question {
  title: string;
  text: ComponentChildren;
  verb: string;
  danger?: boolean;
  act: () => Promise<void>;
}

const question = signal<Question | null>(null);

/** Ask before `act`; an error of it is shown in the dialog. */
export function confirm(asked: Question): void {
  question.value = asked;
}

function Confirmation({ asked }: { asked: Question }) {
  const close = () => {
    question.value = null;
  };
  const action = useAction(asked.act);
  return (
    <Dialog title={asked.title} onClose={close}>
      <div class="stack">{asked.text}</div>
      <Problem error={action.error} />
      <footer>
        <Button onClick={close}>Cancel</Button>
        <Button
          kind={asked.danger ? 'danger' : 'primary'}
          busy={action.busy}
          onClick={async () => {
            if (await action.run()) close();
          }}
        >
          {asked.verb}
        </Button>
      </footer>
    </Dialog>
  );
}

interface Toast {
  id: number;
  text: string;
  bad: boolean;
}

const toasts = signal<Toast[]>([]);
let serial = 0;

/** Say that something was done, or wasn't. */
export function say(text: string, bad = false): void {
  const toast = { id: ++serial, text, bad };
  toasts.value = [...toasts.value, toast].slice(-3);
  setTimeout(() => dismiss(toast.id), bad ? 10_000 : 4000);
}

/** Say an error that has no place on the page. */
export function sayError(error: unknown): void {
  if ((error as Error).name === 'AbortError') return;
  const hint = (error as { hint?: string }).hint;
  say([(error as Error).message, hint].filter(Boolean).join(' '), true);
}

function dismiss(id: number): void {
  toasts.value = toasts.value.filter((toast) => toast.id !== id);
}

export function Overlays() {
  return (
    <>
      {question.value && <Confirmation key={question.value.title} asked={question.value} />}
      <div class="toasts" role="status" aria-live="polite">
        {toasts.value.map((toast) => (
          <div key={toast.id} class={toast.bad ? 'toast bad' : 'toast'}>
            <Icon name={toast.bad ? 'alert' : 'check'} />
            <p>{toast.text}</p>
            <Button kind="quiet" icon="close" aria-label="Dismiss" onClick={() => dismiss(toast.id)} />
          </div>
        ))}
      </div>
    </>
  );
}
