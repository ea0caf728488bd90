/**
 * The editor: CodeMirror in a shadow root.
 *
 * There it adopts its styles as constructed sheets. In the document it would make <style> elements, which the page's
 * content security policy refuses.
 */

import {
  autocompletion,
  closeBrackets,
  closeBracketsKeymap,
  completeAnyWord,
  completionKeymap,
} from '@codemirror/autocomplete';
import { defaultKeymap, history, historyKeymap, indentWithTab } from '@codemirror/commands';
import { go } from '@codemirror/lang-go';
import { javascript } from '@codemirror/lang-javascript';
import { json } from '@codemirror/lang-json';
import { globalCompletion, localCompletionSource, python } from '@codemirror/lang-python';
import {
  bracketMatching,
  HighlightStyle,
  indentOnInput,
  indentUnit,
  StreamLanguage,
  syntaxHighlighting,
} from '@codemirror/language';
import { css } from '@codemirror/legacy-modes/mode/css';
import { shell } from '@codemirror/legacy-modes/mode/shell';
import { toml } from '@codemirror/legacy-modes/mode/toml';
import { html } from '@codemirror/legacy-modes/mode/xml';
import { yaml } from '@codemirror/legacy-modes/mode/yaml';
import { highlightSelectionMatches, searchKeymap } from '@codemirror/search';
import { Compartment, EditorState, type Extension, Text, Transaction } from '@codemirror/state';
import {
  drawSelection,
  EditorView,
  highlightActiveLine,
  highlightActiveLineGutter,
  highlightSpecialChars,
  keymap,
  lineNumbers,
  placeholder,
} from '@codemirror/view';
import { tags } from '@lezer/highlight';

const colors = HighlightStyle.define([
  { tag: [tags.keyword, tags.modifier, tags.operatorKeyword], color: 'var(--code-keyword)' },
  { tag: [tags.string, tags.special(tags.string), tags.regexp], color: 'var(--code-string)' },
  { tag: [tags.number, tags.bool, tags.null, tags.atom], color: 'var(--code-number)' },
  { tag: tags.comment, color: 'var(--soft)', fontStyle: 'italic' },
  { tag: [tags.function(tags.variableName), tags.function(tags.propertyName)], color: 'var(--code-function)' },
  { tag: [tags.definition(tags.variableName), tags.definition(tags.typeName)], color: 'var(--ink)' },
  { tag: [tags.typeName, tags.className, tags.tagName, tags.standard(tags.name)], color: 'var(--code-type)' },
  { tag: [tags.propertyName, tags.attributeName], color: 'var(--code-property)' },
  { tag: tags.meta, color: 'var(--soft)' },
  { tag: tags.heading, fontWeight: '650' },
  { tag: tags.invalid, color: 'var(--bad)' },
]);

const look = EditorView.theme({
  '&': { height: '100%', fontSize: '13px', color: 'var(--ink)', backgroundColor: 'transparent' },
  '&.cm-focused': { outline: 'none' },
  '.cm-scroller': { fontFamily: 'var(--mono)', lineHeight: '1.6', overflow: 'auto' },
  '.cm-content': { padding: '12px 0', caretColor: 'var(--accent)' },
  '.cm-cursor': { borderLeftColor: 'var(--accent)', borderLeftWidth: '2px' },
  '.cm-gutters': { backgroundColor: 'transparent', color: 'var(--faint)', border: 'none', paddingLeft: '6px' },
  '.cm-activeLine': { backgroundColor: 'var(--line-active)' },
  '.cm-activeLineGutter': { backgroundColor: 'transparent', color: 'var(--ink)' },
  '&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground': {
    backgroundColor: 'var(--selection)',
  },
  '.cm-matchingBracket, &.cm-focused .cm-matchingBracket': { backgroundColor: 'var(--selection)' },
  '.cm-selectionMatch': { backgroundColor: 'var(--selection-soft)' },
  '.cm-placeholder': { color: 'var(--soft)' },
  '.cm-tooltip, .cm-panels': { backgroundColor: 'var(--card)', color: 'var(--ink)', border: '1px solid var(--line)' },
  '.cm-tooltip': { borderRadius: '6px', overflow: 'hidden', boxShadow: 'var(--shadow)' },
  '.cm-tooltip-autocomplete ul li[aria-selected]': { backgroundColor: 'var(--accent)', color: 'var(--on-accent)' },
  '.cm-panels input, .cm-panels button': { font: 'inherit', color: 'inherit', background: 'var(--paper)' },
  '.cm-button': { backgroundImage: 'none' },
});

/** The language of a session or of a file's ending. */
export function languageOf(name: string): Extension {
  switch (name) {
    case 'python':
    case 'py':
      return [
        python(),
        indentUnit.of('    '),
        EditorState.languageData.of(() => [
          { autocomplete: localCompletionSource },
          { autocomplete: globalCompletion },
          { autocomplete: completeAnyWord },
        ]),
      ];
    case 'node':
    case 'js':
    case 'cjs':
    case 'mjs':
    case 'jsx':
      return [javascript({ jsx: true }), words];
    case 'typescript':
    case 'deno':
    case 'ts':
    case 'mts':
    case 'tsx':
      return [javascript({ typescript: true, jsx: name === 'tsx' }), words];
    case 'go':
      return [go(), indentUnit.of('\t'), words];
    case 'json':
    case 'ipynb':
    case 'geojson':
      return json();
    case 'shell':
    case 'sh':
    case 'bash':
      return [StreamLanguage.define(shell), words];
    case 'css':
      return StreamLanguage.define(css);
    case 'html':
    case 'htm':
    case 'svg':
    case 'xml':
      return StreamLanguage.define(html);
    case 'toml':
      return StreamLanguage.define(toml);
    case 'yaml':
    case 'yml':
      return StreamLanguage.define(yaml);
    default:
      return [];
  }
}

/**
 * What keeps the ends of lines as they are in a text: by itself the editor takes all kinds for ends, and writes the usual
 * one. Undefined where all are usual.
 */
function endOf(text: string): string | undefined {
  if (!text.includes('\r')) return undefined;
  return /(?:^|[^\r])\n|\r(?!\n)/.test(text) ? '\n' : '\r\n';
}

const endsOf = (text: string): Extension => {
  const end = endOf(text);
  return end === undefined ? [] : EditorState.lineSeparator.of(end);
};

/** Lines that are pasted end as the others do. */
const pasted = EditorView.clipboardInputFilter.of((text, state) => text.replace(/\r\n?|\n/g, state.lineBreak));

const words = EditorState.languageData.of(() => [{ autocomplete: completeAnyWord }]);

export interface Options {
  text: string;
  language: string;
  label: string;
  readOnly?: boolean;
  hint?: string;
  onChange: (text: string) => void;
  /** Ctrl+Enter. */
  onRun?: (() => void) | undefined;
  /** Ctrl+S. */
  onSave?: (() => void) | undefined;
}

export class Editor {
  private readonly view: EditorView;
  private readonly language = new Compartment();
  private readonly ends = new Compartment();
  private quiet = false;

  constructor(host: HTMLElement, options: Options) {
    const root = host.shadowRoot ?? host.attachShadow({ mode: 'open' });
    root.replaceChildren();
    const parent = document.createElement('div');
    parent.style.height = '100%';
    root.append(parent);
    const command = (act: (() => void) | undefined) => () => {
      act?.();
      return act !== undefined;
    };
    this.view = new EditorView({
      root,
      parent,
      state: EditorState.create({
        doc: options.text,
        extensions: [
          keymap.of([
            { key: 'Mod-Enter', run: command(options.onRun), preventDefault: true },
            { key: 'Mod-s', run: command(options.onSave), preventDefault: true },
            // Tab indents; Escape, then Tab, leaves the editor.
            ...closeBracketsKeymap,
            ...completionKeymap,
            ...searchKeymap.filter((each) => each.key !== 'Mod-k'),
            ...historyKeymap,
            ...defaultKeymap.filter((each) => each.key !== 'Mod-Enter' && each.mac !== 'Ctrl-k'),
            indentWithTab,
          ]),
          lineNumbers(),
          highlightActiveLineGutter(),
          highlightSpecialChars(),
          history(),
          drawSelection(),
          indentOnInput(),
          bracketMatching(),
          closeBrackets(),
          autocompletion(),
          highlightActiveLine(),
          highlightSelectionMatches(),
          syntaxHighlighting(colors),
          look,
          this.language.of(languageOf(options.language)),
          this.ends.of(endsOf(options.text)),
          pasted,
          EditorState.readOnly.of(options.readOnly ?? false),
          EditorView.contentAttributes.of({ 'aria-label': options.label }),
          EditorView.perLineTextDirection.of(true),
          placeholder(options.hint ?? ''),
          EditorView.updateListener.of((update) => {
            if (update.docChanged && !this.quiet) options.onChange(update.state.sliceDoc());
          }),
        ],
      }),
    });
  }

  /** Replace the text, which doesn't count as a change by the user. */
  setText(text: string): void {
    if (text === this.view.state.sliceDoc()) return;
    this.quiet = true;
    this.view.dispatch({
      effects: this.ends.reconfigure(endsOf(text)),
      changes: { from: 0, to: this.view.state.doc.length, insert: Text.of(text.split(endOf(text) ?? '\n')) },
      annotations: Transaction.addToHistory.of(false), // or undone it would get the other text's ends
    });
    this.quiet = false;
  }

  setLanguage(name: string): void {
    this.view.dispatch({ effects: this.language.reconfigure(languageOf(name)) });
  }

  focus(): void {
    this.view.focus();
  }

  destroy(): void {
    this.view.destroy();
  }
}
