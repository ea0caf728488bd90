/** One file: as text to edit, as a picture, a table, a PDF document, or a page that can do nothing. */

import { useSignal } from '@preact/signals';
import { useEffect, useMemo } from 'preact/hooks';
import { ApiError, download, fileAt, send } from '../api.ts';
import { draftOf, draftSaved } from '../drafts.ts';
import { bytes } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import type { FileEntry } from '../types.ts';
import { Ago, Button, Name, Problem, Waiting } from '../ui/basics.tsx';
import { confirm, say, sayError } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Icon } from '../ui/icons.tsx';
import { Table } from '../ui/listing.tsx';
import { PictureFile } from './artifacts.tsx';
import { rowsOf } from './csv.ts';
import { PdfDocument } from './document.tsx';

const TEXT_BYTES = 1 << 20;
const PICTURE_BYTES = 32 << 20;
const TABLE_BYTES = 1 << 20;
const ROWS = 500;
const COLUMNS = 100;
const PICTURES: { [ending: string]: string } = {
  png: 'image/png',
  jpg: 'image/jpeg',
  jpeg: 'image/jpeg',
  gif: 'image/gif',
  webp: 'image/webp',
  avif: 'image/avif',
  svg: 'image/svg+xml',
  bmp: 'image/bmp',
};

interface Loaded {
  start: Uint8Array;
  text: string | null;
  etag: string;
  size: number;
  whole: boolean;
}

/** The start of a file, or all of an empty one, which has no range that could be asked for. */
async function startOf(path: string, signal: AbortSignal): Promise<Response> {
  try {
    return await send(path, { signal, headers: { Range: `bytes=0-${TEXT_BYTES - 1}` } });
  } catch (error) {
    if ((error as { status?: number }).status !== 416) throw error;
    return send(path, { signal });
  }
}

/** The start of a file; `text` is null where it isn't UTF-8 text. */
async function load(path: string, signal: AbortSignal): Promise<Loaded> {
  const response = await startOf(path, signal);
  const content = new Uint8Array(await response.arrayBuffer());
  const size = Number(response.headers.get('Content-Range')?.split('/')[1] ?? content.length);
  const whole = size === content.length;
  const etag = response.headers.get('ETag') ?? '';
  const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
  try {
    const text = decoder.decode(content, { stream: !whole });
    return { start: content, text: text.includes('\0') ? null : text, etag, size, whole };
  } catch {
    return { start: content, text: null, etag, size, whole };
  }
}

function Sheet({ text, separator }: { text: string; separator: string }) {
  const rows = useMemo(() => rowsOf(text, separator, ROWS + 1), [text, separator]);
  const [head = [], ...body] = rows;
  const width = Math.min(COLUMNS, Math.max(...rows.map((row) => row.length)));
  const cells = (row: string[]) => Array.from({ length: width }, (_, at) => row[at] ?? '');
  return (
    <Table
      label="Table"
      columns={cells(head).map((cell) => ({ name: cell.slice(0, 200) }))}
      foot={rows.length > ROWS && <p class="soft pad">These are the first {ROWS} rows.</p>}
    >
      {body.map((row, line) => (
        <tr key={String(line)}>
          {cells(row).map((cell, at) => (
            <td key={String(at)}>
              <Name>{cell.slice(0, 200)}</Name>
            </td>
          ))}
        </tr>
      ))}
    </Table>
  );
}

interface Props {
  session: string;
  path: string;
  entry: FileEntry | undefined;
  onDelete: () => void;
  onSaved: () => Promise<void>;
}

export function Preview({ session, path, entry, onDelete, onSaved }: Props) {
  const url = fileAt(session, path);
  const draft = draftOf(`file/${session}/${path}`);
  const ending = /\.([^./]+)$/.exec(path)?.[1]?.toLowerCase() ?? '';
  const picture = PICTURES[ending];
  const separator = { csv: ',', tsv: '\t' }[ending];
  const page = ending === 'html' || ending === 'htm';
  const document = ending === 'pdf';
  const raw = useSignal(draft.value !== undefined);
  const loaded = useLoad((signal) => load(url, signal), [url]);
  // It is loaded again when the list says that it has changed, but not while somebody edits it.
  const editing = draft.value !== undefined;
  const changed = entry?.etag && loaded.value && !loaded.value.etag.includes(entry.etag);
  useEffect(() => {
    if (changed && !editing) void loaded.reload();
  }, [entry?.etag, !!changed, editing]);
  const value = loaded.value;
  const shown = draft.value?.text ?? value?.text ?? '';
  const asPicture = picture !== undefined && !raw.value;
  const asTable = separator !== undefined && !raw.value && value?.text !== null;
  const asDocument = document && !raw.value;
  const asPage = page && !raw.value && value?.text !== null;

  const put = async (content: string, etag: string | null) => {
    const response = await send(url, {
      method: 'PUT',
      body: content,
      headers: { 'Content-Type': 'application/octet-stream', ...(etag ? { 'If-Match': etag } : {}) },
    });
    const saved = response.headers.get('ETag') ?? '';
    if (draft.value) draft.value = { ...draft.value, base: saved };
    await onSaved();
    await loaded.reload();
    draftSaved(draft, content, saved);
    say('The file is saved.');
  };
  const save = useAction(async () => {
    if (!draft.value) return;
    const { text: content, base } = draft.value;
    try {
      await put(content, String(base));
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 412) throw error;
      confirm({
        title: 'The file has changed meanwhile',
        text: (
          <p>Somebody else or a run has written it since you began. Saving replaces that; it stays in the history.</p>
        ),
        verb: 'Replace it',
        act: () => put(content, null),
      });
    }
  });
  const type = (typed: string) => {
    const base = draft.value?.base ?? value?.etag ?? '';
    draft.value = typed === value?.text ? undefined : { text: typed, base };
  };
  const editable = value?.text !== null && value?.whole;

  return (
    <>
      <div class="pane-head wrap">
        <h2 class="file-name">
          <Name>{path}</Name>
        </h2>
        <span class="soft">
          {bytes(entry?.size ?? value?.size)}
          {entry && (
            <>
              , <Ago time={entry.modified_at ?? ''} />
            </>
          )}
        </span>
        <span class="push" />
        {editable && !asPicture && !asTable && !asPage && !asDocument && (
          <Button
            kind={editing ? 'primary' : undefined}
            icon="check"
            disabled={!editing}
            busy={save.busy}
            onClick={() => void save.run()}
          >
            {editing ? 'Save' : 'Saved'}
          </Button>
        )}
        {(picture === 'image/svg+xml' || separator || page) && (
          <Button
            icon={raw.value ? iconFor(ending) : 'edit'}
            aria-pressed={raw.value}
            onClick={() => {
              raw.value = !raw.value;
            }}
          >
            {raw.value ? 'View' : 'Text'}
          </Button>
        )}
        <Button
          kind="quiet"
          icon="down"
          aria-label="Download"
          title="Download"
          onClick={() => void download(url, path.split('/').pop() ?? 'file').catch(sayError)}
        />
        <Button kind="quiet" icon="trash" aria-label="Delete" title="Delete" onClick={onDelete} />
      </div>
      <Problem error={loaded.error ?? save.error} />
      {!value && !loaded.error && <Waiting />}
      {value &&
        (asPicture ? (
          value.size > PICTURE_BYTES ? (
            <Unseen text="The picture is too large to be shown here." />
          ) : (
            <div class="picture-box">
              <PictureFile key={value.etag} path={url} type={picture} alt={path} />
            </div>
          )
        ) : asDocument ? (
          <PdfDocument source={{ path: url, ...value }} label={`Pages of ${path}`} />
        ) : value.text === null ? (
          <Unseen text="This isn’t text." />
        ) : asTable && value.size <= TABLE_BYTES ? (
          <Sheet text={value.text} separator={separator} />
        ) : asPage ? (
          <>
            <p class="pane-note soft">Shown without scripts, styles and anything from elsewhere.</p>
            <iframe class="page-preview" sandbox="" title={`Preview of ${path}`} srcDoc={value.text} />
          </>
        ) : (
          <>
            {!value.whole && (
              <p class="pane-note soft">
                The first {bytes(TEXT_BYTES)} of {bytes(value.size)}. It is too large to be edited here.
              </p>
            )}
            <CodeEditor
              text={value.whole ? shown : foldLines(shown)}
              language={ending}
              label={`Content of ${path}`}
              readOnly={!value.whole}
              onText={type}
              onSave={() => void save.run()}
            />
          </>
        ))}
    </>
  );
}

function iconFor(ending: string): string {
  return ending === 'csv' || ending === 'tsv' ? 'table' : ending === 'svg' ? 'image' : 'globe';
}

/** Text whose lines are short enough for any editor. */
function foldLines(text: string): string {
  return text
    .split('\n')
    .map((line) => (line.length > 5000 ? `${line.slice(0, 5000)} …` : line))
    .join('\n');
}

function Unseen({ text }: { text: string }) {
  return (
    <div class="pane-empty">
      <Icon name="file" size={24} />
      <p>{text}</p>
    </div>
  );
}
