/** The files of a session: a tree, and the file that is open. Files are dragged in and out. */

import { useSignal } from '@preact/signals';
import { useMemo, useRef } from 'preact/hooks';
import { apiKey, at, call, download, fileAt } from '../api.ts';
import { useCommands } from '../commands.ts';
import { bytes, count, plain } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { go, href } from '../router.ts';
import type { FileEntry, Page } from '../types.ts';
import { Button, Form, Name, Problem, TextField, Waiting } from '../ui/basics.tsx';
import { confirm, Dialog, say, sayError } from '../ui/dialog.tsx';
import { Icon } from '../ui/icons.tsx';
import { type Dropped, droppedFiles } from './dropped.ts';
import type { TabProps } from './page.tsx';
import { Preview } from './preview.tsx';

type Listing = Page & { files: FileEntry[]; total_count: number; total_size_bytes: number };

interface Folder {
  name: string;
  path: string;
  folders: Map<string, Folder>;
  files: FileEntry[];
}

const PAGES = 10;
const MANY = 300;

/** Folders and files, from the list of paths. */
function treeOf(files: FileEntry[]): Folder {
  const root: Folder = { name: '', path: '', folders: new Map(), files: [] };
  for (const file of files) {
    let folder = root;
    const parts = file.path.split('/');
    const directory = file.type === 'dir';
    for (const part of directory ? parts : parts.slice(0, -1)) {
      const path = folder.path ? `${folder.path}/${part}` : part;
      let next = folder.folders.get(part);
      if (!next) {
        next = { name: part, path, folders: new Map(), files: [] };
        folder.folders.set(part, next);
      }
      folder = next;
    }
    if (!directory) folder.files.push(file);
  }
  return root;
}

export function iconOf(path: string): string {
  if (/\.(png|jpe?g|gif|webp|avif|svg|bmp)$/i.test(path)) return 'image';
  if (/\.(csv|tsv|parquet|xlsx)$/i.test(path)) return 'table';
  return 'file';
}

interface BranchProps {
  session: string;
  folder: Folder;
  open: ReadonlySet<string>;
  chosen: string;
  toggle: (path: string) => void;
}

function Branch({ session, folder, open, chosen, toggle }: BranchProps) {
  const shown = useSignal(MANY);
  return (
    <ul>
      {[...folder.folders.values()].map((each) => (
        <li key={each.path}>
          <button type="button" aria-expanded={open.has(each.path)} onClick={() => toggle(each.path)}>
            <span class={open.has(each.path) ? 'twist open' : 'twist'}>›</span>
            <Icon name="folder" />
            <Name>{each.name}</Name>
          </button>
          {open.has(each.path) && (
            <Branch session={session} folder={each} open={open} chosen={chosen} toggle={toggle} />
          )}
        </li>
      ))}
      {folder.files.slice(0, shown.value).map((file) => (
        <li key={file.path}>
          <a
            href={href('sessions', session, 'files', file.path)}
            aria-current={file.path === chosen ? 'true' : undefined}
            draggable
            onDragStart={(event) => {
              // Chromium downloads this URL to where the file is dropped. It takes no key along.
              const url = new URL(fileAt(session, file.path), location.href).href;
              const name = file.path.split('/').pop() ?? 'file';
              if (!apiKey.value) event.dataTransfer?.setData('DownloadURL', `application/octet-stream:${name}:${url}`);
              event.dataTransfer?.setData('text/plain', file.path);
            }}
          >
            <Icon name={iconOf(file.path)} />
            <Name>{file.path.split('/').pop() ?? ''}</Name>
            <span class="push" />
            <small class="soft">{bytes(file.size)}</small>
          </a>
        </li>
      ))}
      {folder.files.length > shown.value && (
        <li>
          <button
            type="button"
            class="link"
            onClick={() => {
              shown.value += MANY * 10;
            }}
          >
            {(folder.files.length - shown.value).toLocaleString('en')} more
          </button>
        </li>
      )}
    </ul>
  );
}

function NewFile({ session, done }: { session: string; done: (path: string | null) => void }) {
  const path = useSignal('');
  const make = useAction(async () => {
    await call(fileAt(session, path.value), {
      method: 'PUT',
      body: '',
      headers: { 'If-None-Match': '*', 'Content-Type': 'application/octet-stream' },
    });
    done(path.value);
  });
  return (
    <Dialog title="New file" onClose={() => done(null)}>
      <Form onSubmit={() => void make.run()}>
        <TextField
          label="Path"
          hint="Folders are made as they are needed."
          placeholder="notes/first.md"
          value={path.value}
          onText={(text) => {
            path.value = text;
          }}
        />
        <Problem error={make.error} />
        <footer>
          <Button onClick={() => done(null)}>Cancel</Button>
          <Button kind="primary" type="submit" busy={make.busy} disabled={!path.value}>
            Create
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

export function FilesTab({ session, reload, rest }: TabProps) {
  const chosen = rest.join('/');
  const folded = useSignal<ReadonlySet<string>>(new Set());
  const search = useSignal('');
  const making = useSignal(false);
  const over = useSignal(false);
  const uploading = useSignal('');
  const picker = useRef<HTMLInputElement>(null);
  const list = useLoad(
    async (signal) => {
      const all: FileEntry[] = [];
      let page: Listing;
      let cursor: string | null = null;
      let pages = 0;
      do {
        page = await call<Listing>(at(session.id, 'files'), { signal, query: { cursor } });
        all.push(...page.files);
        cursor = page.next_cursor;
      } while (cursor && ++pages < PAGES);
      return { ...page, files: all };
    },
    [session.id],
    [session.version, session.status],
  );
  const files = list.value?.files ?? [];
  const found = useMemo(
    () => files.filter((file) => file.path.toLowerCase().includes(search.value.toLowerCase())),
    [files, search.value],
  );
  const tree = useMemo(() => treeOf(found), [found]);
  // Few folders are open at first, many are closed.
  const open = useMemo(() => {
    const paths = new Set<string>();
    const visit = (folder: Folder) => {
      for (const each of folder.folders.values()) {
        const expanded = found.length <= 100 || search.value !== '' || chosen.startsWith(`${each.path}/`);
        if (expanded !== folded.value.has(each.path)) paths.add(each.path);
        visit(each);
      }
    };
    visit(tree);
    return paths;
  }, [tree, folded.value, chosen]);
  const toggle = (path: string) => {
    const next = new Set(folded.value);
    if (!next.delete(path)) next.add(path);
    folded.value = next;
  };

  const upload = async (dropped: Dropped[]) => {
    let sent = 0;
    try {
      for (const { path, file } of dropped) {
        uploading.value = `${sent + 1} of ${dropped.length}`;
        await call(fileAt(session.id, path), {
          method: 'PUT',
          body: file,
          headers: { 'Content-Type': 'application/octet-stream' },
        });
        sent++;
      }
      if (sent) say(`${count(sent, 'file')} uploaded.`);
    } catch (error) {
      sayError(error);
    }
    uploading.value = '';
    await Promise.all([reload(), list.reload()]);
    if (sent === 1 && dropped[0]) go('sessions', session.id, 'files', dropped[0].path);
  };
  const remove = (path: string) =>
    confirm({
      title: 'Delete this file',
      text: (
        <p>
          <code>
            <Name>{path}</Name>
          </code>{' '}
          goes with the next version. The one in force now keeps it.
        </p>
      ),
      verb: 'Delete',
      danger: true,
      act: async () => {
        await call(fileAt(session.id, path), { method: 'DELETE' });
        say(`${plain(path)} was deleted.`);
        go('sessions', session.id, 'files');
        await Promise.all([reload(), list.reload()]);
      },
    });
  const archive = (format: string) =>
    void download(at(session.id, 'archive'), `${session.id}.${format}`, { format }).catch(sayError);
  useCommands(
    [
      { title: 'Upload files', keys: 'u', group: 'Do', run: () => picker.current?.click() },
      {
        title: 'New file',
        keys: 'f',
        group: 'Do',
        run: () => {
          making.value = true;
        },
      },
      { title: 'Download all files as zip', group: 'Do', run: () => archive('zip') },
      { title: 'Download all files as tar.gz', group: 'Do', run: () => archive('tar.gz') },
    ],
    [session.id],
  );
  const entry = files.find((file) => file.path === chosen);

  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: what is dropped here can be uploaded by the button, too
    <div
      class={over.value ? 'split files dropping' : 'split files'}
      onDragOver={(event) => {
        if (!event.dataTransfer?.types.includes('Files')) return;
        event.preventDefault();
        over.value = true;
      }}
      onDragLeave={(event) => {
        if (!event.currentTarget.contains(event.relatedTarget as Node | null)) over.value = false;
      }}
      onDrop={(event) => {
        if (!event.dataTransfer?.types.includes('Files')) return;
        event.preventDefault();
        over.value = false;
        void droppedFiles(event.dataTransfer).then(upload);
      }}
    >
      <div class="pane">
        <div class="pane-head wrap">
          <Button icon="up" busy={uploading.value !== ''} onClick={() => picker.current?.click()}>
            {uploading.value || 'Upload'}
          </Button>
          <Button
            icon="plus"
            onClick={() => {
              making.value = true;
            }}
          >
            New
          </Button>
          <span class="push" />
          <Button
            kind="quiet"
            icon="down"
            disabled={!files.length}
            onClick={() => archive('zip')}
            title="Download all as zip"
          >
            All
          </Button>
          <input
            ref={picker}
            type="file"
            multiple
            hidden
            aria-label="Files to upload"
            onChange={(event) => {
              const picked = [...(event.currentTarget.files ?? [])].map((file) => ({ path: file.name, file }));
              event.currentTarget.value = '';
              void upload(picked);
            }}
          />
        </div>
        {files.length > 15 && (
          <div class="search in-pane">
            <Icon name="search" />
            <input
              type="search"
              aria-label="Search files"
              placeholder="Search files"
              value={search.value}
              onInput={(event) => {
                search.value = event.currentTarget.value;
              }}
            />
          </div>
        )}
        <Problem error={list.error} retry={() => void list.reload()} />
        {!list.value && !list.error && <Waiting />}
        {list.value && !files.length ? (
          <div class="pane-empty">
            <Icon name="folder" size={24} />
            <p>{session.persistent ? 'No files yet. Drop some here.' : 'This session keeps no files.'}</p>
          </div>
        ) : (
          <div class="file-tree">
            <Branch session={session.id} folder={tree} open={open} chosen={chosen} toggle={toggle} />
          </div>
        )}
        {list.value && files.length > 0 && (
          <p class="pane-foot soft">
            {count(list.value.total_count, 'file')}, {bytes(list.value.total_size_bytes)}
            {files.length < list.value.total_count && `; the first ${files.length.toLocaleString('en')} are shown`}
          </p>
        )}
      </div>
      <div class="pane">
        {chosen ? (
          <Preview
            key={chosen}
            session={session.id}
            path={chosen}
            entry={entry}
            onDelete={() => remove(chosen)}
            onSaved={async () => {
              await Promise.all([reload(), list.reload()]);
            }}
          />
        ) : (
          <div class="pane-empty">
            <Icon name="file" size={24} />
            <p>{files.length ? 'Choose a file to see it.' : 'A file that you choose is shown here.'}</p>
          </div>
        )}
      </div>
      {making.value && (
        <NewFile
          session={session.id}
          done={(path) => {
            making.value = false;
            if (!path) return;
            void Promise.all([reload(), list.reload()]);
            go('sessions', session.id, 'files', path);
          }}
        />
      )}
    </div>
  );
}
