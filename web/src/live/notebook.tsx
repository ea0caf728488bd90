/** A context as a notebook: cells that are run in an interpreter which stays. */

import type { Signal } from '@preact/signals';
import { at, call } from '../api.ts';
import { type Followed, follow, NOT_RUN } from '../following.ts';
import { bytes } from '../format.ts';
import { useInterval, useLoad } from '../hooks.ts';
import { Kept } from '../kept.ts';
import { href } from '../router.ts';
import type { TabProps } from '../session/page.tsx';
import type { CellResult, Context } from '../types.ts';
import { Button, Empty, Problem, Status } from '../ui/basics.tsx';
import { confirm, say, sayError } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Output, Printed } from '../ui/output.tsx';
import { NO_PICTURE, Picture } from '../ui/pictures.tsx';
import { Tree } from '../ui/tree.tsx';
import { CellOutput } from './cell.ts';

const NAME = 'notebook';
const REFRESH_MS = 3000;
const LANGUAGES = ['python', 'node', 'typescript'];

interface Cell extends Followed {
  serial: number;
  code: string;
  output: CellOutput | null;
}

let serial = 0;
const cell = (): Cell => ({ ...NOT_RUN, serial: ++serial, code: '', output: null });
/** The cells of each session, as long as the page is open. */
const notebooks = new Kept(() => [cell()]);

/** The richest form of a result that can do nothing: a picture, a page without scripts, JSON, or text. */
function Result({ result }: { result: Pick<CellResult, 'data'> }) {
  const { data } = result;
  // Programs make them, and may put anything there.
  const text = (type: string) => (typeof data[type] === 'string' ? data[type] : undefined);
  const picture = ['image/png', 'image/jpeg', 'image/gif', 'image/webp', 'image/svg+xml'].find(text);
  if (picture) {
    const content = text(picture) ?? '';
    const load = () => contentOf(picture, content);
    return <Picture of={content} load={load} type={picture} alt="Result" class="result-picture" />;
  }
  const page = text('text/html');
  if (page) return <iframe class="result-page" sandbox="" title="Result as a page" srcDoc={page} />;
  const json = data['application/json'];
  if (json && typeof json !== 'string') return <Tree value={json} />;
  if (typeof json === 'string') {
    try {
      return <Tree value={JSON.parse(json)} />;
    } catch {
      return <Printed text={json} label="Result" />;
    }
  }
  const other = text('text/plain') ?? Object.values(data)[0] ?? '';
  return typeof other === 'string' ? <Printed text={other} label="Result" /> : <Tree value={other} />;
}

/** A picture from the text that a result has of it: SVG, or Base64 of the others. Throws where it is neither. */
async function contentOf(type: string, text: string): Promise<BlobPart> {
  if (type === 'image/svg+xml') return text;
  try {
    return Uint8Array.from(atob(text.replace(/\s/g, '')), (char) => char.charCodeAt(0));
  } catch {
    throw new Error(NO_PICTURE);
  }
}

/** What a cell has written and shown, in its order. */
function Parts({ output, label }: { output: CellOutput; label: string }) {
  return output.parts.value.map(({ serial, text, shown }, at) =>
    text ? (
      <Output key={`${serial}`} run={text} label={at ? `${label}, part ${at + 1}` : label} />
    ) : (
      <Result key={`${serial}`} result={shown} />
    ),
  );
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
  const shown = cells.value[index];
  if (!shown) return null;
  const put = (change: Partial<Cell>) => {
    cells.value = cells.value.map((each) => (each.serial === shown.serial ? { ...each, ...change } : each));
  };
  const run = async () => {
    const now = cells.value.find((each) => each.serial === shown.serial);
    if (!now || now.running || !now.code.trim()) return;
    const output = new CellOutput((displayId, shown) => {
      for (const each of cells.value) each.output?.update(displayId, shown);
    });
    if (index === cells.value.length - 1) cells.value = [...cells.value, cell()];
    await follow(
      session,
      () => ({ code: now.code, context: NAME }),
      output,
      (change) => put({ ...change, output }),
    );
    changed();
  };
  const remove = () => {
    cells.value = cells.value.filter((each) => each.serial !== shown.serial);
    if (!cells.value.length) cells.value = [cell()];
  };
  const { end, output } = shown;
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
      {output && (
        <div class="cell-output">
          <Parts output={output} label={`Output of cell ${index + 1}`} />
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
  const cells = notebooks.of(session.id);
  const supported = LANGUAGES.includes(session.language);
  const list = useLoad(
    (signal) =>
      supported
        ? call<{ contexts: Context[] }>(at(session.id, 'contexts'), { signal })
        : Promise.resolve({ contexts: [] as Context[] }),
    [session.id],
  );
  useInterval(() => void list.refresh(), supported ? REFRESH_MS : null);
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
        }}
      >
        Cell
      </Button>
    </div>
  );
}
