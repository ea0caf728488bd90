/** An editor whose code is loaded when it is first needed; the text is shown at once. */

import { useEffect, useRef, useState } from 'preact/hooks';
import type { Editor } from './codemirror.ts';

interface Props {
  text: string;
  language: string;
  label: string;
  readOnly?: boolean;
  hint?: string;
  focus?: boolean;
  onText?: (text: string) => void;
  onRun?: (() => void) | undefined;
  onSave?: (() => void) | undefined;
}

export function CodeEditor({ text, language, label, readOnly, hint, focus, onText, onRun, onSave }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const editor = useRef<Editor | null>(null);
  const [ready, setReady] = useState(false);
  // The editor's text as far as this component knows, and what was typed since the two were the same.
  const own = useRef(text);
  const typed = useRef(new Set<string>());
  const latest = useRef({ onText, onRun, onSave, text, language });
  latest.current = { onText, onRun, onSave, text, language };

  useEffect(() => {
    let gone = false;
    void import('./codemirror.ts').then((module) => {
      if (gone || !host.current) return;
      const { current } = latest;
      own.current = current.text;
      editor.current = new module.Editor(host.current, {
        text: current.text,
        language: current.language,
        label,
        readOnly: readOnly ?? false,
        hint: hint ?? '',
        onChange: (changed) => {
          own.current = changed;
          typed.current.add(changed);
          latest.current.onText?.(changed);
        },
        onRun: onRun && (() => latest.current.onRun?.()),
        onSave: onSave && (() => latest.current.onSave?.()),
      });
      if (focus) editor.current.focus();
      setReady(true);
    });
    return () => {
      gone = true;
      editor.current?.destroy();
      editor.current = null;
    };
  }, [readOnly]);

  useEffect(() => {
    // What was typed comes back here, later than the next key may come. It must not take that back.
    if (text === own.current) typed.current.clear();
    else if (!typed.current.has(text)) {
      own.current = text;
      editor.current?.setText(text);
    }
  }, [text, ready]);
  useEffect(() => editor.current?.setLanguage(language), [language, ready]);

  return (
    <div class="editor" data-ready={ready}>
      <div class="editor-host" ref={host} />
      {!ready && <pre class="editor-before">{text}</pre>}
    </div>
  );
}
