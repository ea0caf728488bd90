/** A context as a notebook: cells that are run in an interpreter which stays. */

import { type Signal, useSignal } from '@preact/signals';
import { useRef } from 'preact/hooks';
import { at, call, events, send } from '../api.ts';
import { bytes } from '../format.ts';
import { useInterval, useLoad } from '../hooks.ts';
import { href } from '../router.ts';
import type { TabProps } from '../session/page.tsx';
import type { CellResult, Context, RunEnd } from '../types.ts';
import { Button, Empty, Problem, Status } from '../ui/basics.tsx';
import { confirm, say, sayError } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Output, Printed, type Screen } from '../ui/output.tsx';
import { Tree } from '../ui/tree.tsx';

const NAME = 'notebook';
const REFRESH_MS = 3000;
const LANGUAGES = ['python', 'node', 'typescript'];

interface Cell {
  serial: number;
  code: string;
  run: number;
  running: boolean;
  end: RunEnd | null;
  error: Error | undefined;
}

let serial = 0;
const cell = (code = ''): Cell => ({ serial: ++serial, code, run: 0, running: false, end: null, error: undefined });
/** The cells of each session, as long as the page is open. */
const notebooks = new Map<string, Cell[]>();

/** The richest form of a result that can do nothing: a picture, a page without scripts, JSON, or text. */
function Result({ result }: { result: CellResult }) {
  const { data } = result;
  const picture = ['image/png', 'image/jpeg', 'image/gif', 'image/webp'].find((type) => data[type]);
  if (picture) return <Embedded type={picture} base64={data[picture] ?? ''} />;
  if (data['image/svg+xml']) return <Embedded type="image/svg+xml" text={data['image/svg+xml']} />;
  if (data['text/html'])
    return <iframe class="result-page" sandbox="" title="Result as a page" srcDoc={data['text/html']} />;
  if (data['application/json']) {
    const json = data['application/json'] as unknown;
    try {
      return <Tree value={typeof json === 'string' ? JSON.parse(json) : json} />;
    } catch {
      return <Printed text={String(json)} label="Result" />;
    }
  }
  return <Printed text={data['text/plain'] ?? Object.values(data)[0] ?? ''} label="Result" />;
}

function Embedded({ type, base64, text }: { type: string; base64?: string; text?: string }) {
  const url = useRef('');
  if (!url.current) {
    const content =
      base64 === undefined
        ? (text ?? '')
        : Uint8Array.from(atob(base64.replace(/\s/g, '')), (char) => char.charCodeAt(0));
    url.current = URL.createObjectURL(new Blob([content], { type }));
  }
  return <img class="picture result-picture" src={url.current} alt="Result" />;
}

function CellView({
  session,
  language,
  cells,
  index,
  changed,
}: {
  session: string;
  language: string;
  cells: Signal<Cell[]>;
  index: number;
  changed: () => void;
}) {
  const screen = useRef<Screen | null>(null);
  const shown = cells.value[index];
  if (!shown) return null;
  const put = (change: Partial<Cell>) => {
    const next = cells.value.map((each) => (each.serial === shown.serial ? { ...each, ...change } : each));
    cells.value = next;
    notebooks.set(session, next);
  };
  const run = async () => {
    const now = cells.value.find((each) => each.serial === shown.serial);
    if (!now || now.running || !now.code.trim()) return;
    put({ running: true, run: now.run + 1, end: null, error: undefined });
    if (index === cells.value.length - 1) {
      cells.value = [...cells.value, cell()];
      notebooks.set(session, cells.value);
    }
    try {
      const response = await send(at(session, 'stream'), { json: { code: now.code, context: NAME } });
      for await (const { data } of events(response)) {
        if (data.type === 'stdout' || data.type === 'stderr') screen.current?.write(data.type, String(data.content));
        else if (data.type === 'done') put({ end: data as unknown as RunEnd });
        else if (data.type === 'error') put({ error: new Error(String(data.error)) });
      }
    } catch (error) {
      put({ error: error as Error });
    }
    put({ running: false });
    changed();
  };
  const remove = () => {
    cells.value = cells.value.filter((each) => each.serial !== shown.serial);
    if (!cells.value.length) cells.value = [cell()];
    notebooks.set(session, cells.value);
  };
  const { end } = shown;
  const number = end?.execution_count;
  return (
    <li class="cell-box">
      <div class="cell-head">
        <span class="mono soft">[{shown.running ? '*' : (number ?? ' ')}]</span>
        <Button
          kind="quiet"
          icon="play"
          aria-label={`Run cell ${index + 1}`}
          title="Ctrl Enter"
          busy={shown.running}
          onClick={() => void run()}
        />
        <span class="push" />
        {end && end.status !== 'ok' && <Status>{end.status}</Status>}
        {end && <span class="soft">{end.duration}</span>}
        <Button kind="quiet" icon="trash" aria-label={`Remove cell ${index + 1}`} title="Remove" onClick={remove} />
      </div>
      <CodeEditor
        text={shown.code}
        language={language}
        label={`Cell ${index + 1}`}
        hint={index === 0 ? 'A cell. Ctrl Enter runs it; what it defines is there for the next.' : ''}
        onText={(code) => put({ code })}
        onRun={() => void run()}
      />
      {shown.run > 0 && (
        <div class="cell-output">
          <Output
            run={shown.run}
            label={`Output of cell ${index + 1}`}
            onReady={(ready) => {
              screen.current = ready;
            }}
          />
          {end?.results?.map((result, at) => (
            <Result key={`${shown.run}/${at}`} result={result} />
          ))}
          {end?.results_truncated && <p class="soft">Some results were too large, and are left out.</p>}
          {end?.memory && !end.memory.kept && (
            <p class="warning">Variables of earlier cells are gone: {end.memory.reason}</p>
          )}
          {end && !end.state.committed && <p class="warning">Nothing was committed. {end.state.reason}</p>}
          <Problem error={shown.error} />
        </div>
      )}
    </li>
  );
}

export function NotebookTab({ session, reload }: TabProps) {
  const cells = useSignal<Cell[]>(notebooks.get(session.id) ?? [cell()]);
  const supported = LANGUAGES.includes(session.language);
  const list = useLoad(
    (signal) =>
      supported
        ? call<{ contexts: Context[] }>(at(session.id, 'contexts'), { signal })
        : Promise.resolve({ contexts: [] as Context[] }),
    [session.id],
  );
  useInterval(() => void list.reload(), supported ? REFRESH_MS : null);
  const context = list.value?.contexts.find((each) => each.name === NAME);
  const changed = () => void Promise.all([list.reload(), reload()]);
  const act = async (verb: string) => {
    try {
      await call(at(session.id, 'contexts', NAME, verb), { method: 'POST' });
      if (verb === 'restart') say('The context has a new interpreter.');
    } catch (error) {
      sayError(error);
    }
    changed();
  };
  if (!supported)
    return (
      <Empty icon="notebook" title="No notebook in this language">
        <p class="soft">Interpreters that stay between runs are there for Python, Node and TypeScript.</p>
        <a class="button" href={href('sessions', session.id, 'run')}>
          Run code
        </a>
      </Empty>
    );
  return (
    <div class="notebook">
      <header class="section-head wrap">
        {context ? (
          <>
            <Status>{context.status === 'busy' ? 'running' : 'idle'}</Status>
            <span class="soft">
              {context.kernel}, {bytes(context.memory_bytes)}
            </span>
          </>
        ) : (
          <span class="soft">The first cell that is run starts an interpreter, which stays.</span>
        )}
        <span class="push" />
        <Button icon="stop" disabled={context?.status !== 'busy'} onClick={() => void act('interrupt')}>
          Interrupt
        </Button>
        <Button
          icon="refresh"
          disabled={!context}
          onClick={() =>
            confirm({
              title: 'Restart the interpreter',
              text: <p>Variables are gone then. Cells, data and files stay.</p>,
              verb: 'Restart',
              act: () => act('restart'),
            })
          }
        >
          Restart
        </Button>
      </header>
      <Problem error={list.error} />
      <ol class="cells">
        {cells.value.map((each, index) => (
          <CellView
            key={each.serial}
            session={session.id}
            language={session.language}
            cells={cells}
            index={index}
            changed={changed}
          />
        ))}
      </ol>
      <Button
        icon="plus"
        onClick={() => {
          cells.value = [...cells.value, cell()];
          notebooks.set(session.id, cells.value);
        }}
      >
        Cell
      </Button>
    </div>
  );
}
