/** The history of a session: its versions, what each changed, their names, and ways back. */

import { useSignal } from '@preact/signals';
import { at, call, download } from '../api.ts';
import { bytes, count } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { go, href } from '../router.ts';
import type { Diff, Page, Session, Version } from '../types.ts';
import { Ago, Button, Form, Name, Problem, TextField, Waiting } from '../ui/basics.tsx';
import { confirm, Dialog, say, sayError } from '../ui/dialog.tsx';
import { Changes } from '../ui/tree.tsx';
import type { TabProps } from './page.tsx';

const CAUSES: { [cause: string]: string } = {
  create: 'created',
  run: 'a run',
  data: 'data set',
  files: 'files changed',
  rollback: 'rolled back',
  duplicate: 'a copy',
  setup: 'setup',
  checkpoint: 'checkpoint',
};

function Files({ title, files }: { title: string; files: Diff['files']['added'] }) {
  if (!files.length) return null;
  return (
    <>
      <h3>
        {title} <span class="soft">{files.length}</span>
      </h3>
      <ul class="plain-list">
        {files.slice(0, 500).map((file) => (
          <li key={file.path}>
            <code>
              <Name>{file.path}</Name>
            </code>
            {file.size !== undefined && <small class="soft">{bytes(file.size)}</small>}
          </li>
        ))}
        {files.length > 500 && <li class="soft">and {(files.length - 500).toLocaleString('en')} more</li>}
      </ul>
    </>
  );
}

function NameDialog({ session, version, done }: { session: string; version: Version; done: () => void }) {
  const name = useSignal(version.name ?? '');
  const path = at(session, 'versions', version.version, 'name');
  const save = useAction(async () => {
    if (name.value) await call(path, { method: 'PUT', json: { name: name.value } });
    else await call(path, { method: 'DELETE' });
    done();
  });
  return (
    <Dialog title={`Name version ${version.version}`} onClose={done}>
      <Form onSubmit={() => void save.run()}>
        <TextField
          label="Name"
          hint="A version with a name is kept, however many newer ones there are."
          value={name.value}
          onText={(text) => {
            name.value = text;
          }}
        />
        <Problem error={save.error} />
        <footer>
          <Button onClick={done}>Cancel</Button>
          <Button kind="primary" type="submit" busy={save.busy} disabled={!name.value && !version.name}>
            {name.value || !version.name ? 'Name it' : 'Take the name away'}
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

/** Asks for the id of a copy, and goes there. */
export function ForkDialog({ session, version, onClose }: { session: string; version?: number; onClose: () => void }) {
  const id = useSignal('');
  const fork = useAction(async () => {
    const made = await call<Session>(at(session, 'duplicate'), {
      json: { ...(id.value ? { id: id.value } : {}), ...(version ? { from_version: version } : {}) },
    });
    say(`${made.id} is a copy of ${session}${version ? `, version ${version}` : ''}.`);
    onClose();
    go('sessions', made.id);
  });
  return (
    <Dialog title={version ? `A new session from version ${version}` : 'A copy of this session'} onClose={onClose}>
      <Form onSubmit={() => void fork.run()}>
        <TextField
          label="Id"
          hint="Left out, the server chooses one."
          placeholder={`${session}-copy`}
          value={id.value}
          onText={(text) => {
            id.value = text;
          }}
        />
        <Problem error={fork.error} />
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" type="submit" icon="fork" busy={fork.busy}>
            Copy
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

export function VersionsTab({ session, set, rest }: TabProps) {
  const chosen = Number(rest[0]) || session.version;
  const naming = useSignal<Version | null>(null);
  const forking = useSignal<number | null>(null);
  const older = useSignal<{ versions: Version[]; cursor: string | null } | null>(null);
  const first = useLoad(
    (signal) => call<Page & { versions: Version[] }>(at(session.id, 'versions'), { signal }),
    [session.id],
    [session.version],
  );
  const diff = useLoad(
    (signal) => call<Diff>(at(session.id, 'versions', chosen, 'diff'), { signal }),
    [session.id, chosen],
  );
  const head = first.value?.versions ?? [];
  const lowest = head.at(-1)?.version ?? 0;
  const versions = [...head, ...(older.value?.versions ?? []).filter((each) => each.version < lowest)];
  const cursor = older.value ? older.value.cursor : (first.value?.next_cursor ?? null);
  const version = versions.find((each) => each.version === chosen);
  const changed = diff.value;
  const nothing =
    changed &&
    !changed.data.length &&
    !changed.files.added.length &&
    !changed.files.changed.length &&
    !changed.files.removed.length;

  const more = async () => {
    try {
      const page = await call<Page & { versions: Version[] }>(at(session.id, 'versions'), { query: { cursor } });
      older.value = { versions: [...(older.value?.versions ?? []), ...page.versions], cursor: page.next_cursor };
    } catch (error) {
      sayError(error);
    }
  };

  return (
    <div class="columns timeline-columns">
      <section>
        <Problem error={first.error} retry={() => void first.reload()} />
        {!versions.length && !first.error && <Waiting />}
        <ol class="timeline" aria-label="Versions">
          {versions.map((each) => (
            <li key={each.version} class={each.name ? 'named' : ''}>
              <a
                href={href('sessions', session.id, 'versions', each.version)}
                aria-current={each.version === chosen ? 'true' : undefined}
              >
                <b>v{each.version}</b>
                {each.name && (
                  <span class="label">
                    <Name>{each.name}</Name>
                  </span>
                )}
                <span class="soft">{CAUSES[each.cause] ?? each.cause}</span>
                {each.version === session.version && <span class="label strong">in force</span>}
                <span class="push" />
                <span class="soft">
                  <Ago time={each.created_at} />
                </span>
              </a>
            </li>
          ))}
        </ol>
        {cursor && <Button onClick={() => void more()}>Older versions</Button>}
      </section>
      <section>
        <header class="section-head wrap">
          <h2>Version {chosen}</h2>
          <span class="push" />
          {version && (
            <Button
              icon="tag"
              onClick={() => {
                naming.value = version;
              }}
            >
              Name
            </Button>
          )}
          <Button
            icon="fork"
            onClick={() => {
              forking.value = chosen;
            }}
          >
            Fork
          </Button>
          <Button
            icon="back"
            disabled={chosen === session.version}
            onClick={() =>
              confirm({
                title: `Roll back to version ${chosen}`,
                text: (
                  <p>
                    Data and files of version {chosen} become version {session.version + 1}. Nothing is lost: version{' '}
                    {session.version} stays in the history.
                    {session.status === 'live' && ' Processes and contexts that run in the session are ended first.'}
                  </p>
                ),
                verb: 'Roll back',
                act: async () => {
                  set(await call<Session>(at(session.id, 'rollback'), { json: { version: chosen, stop: true } }));
                  say(`Data and files are those of version ${chosen}.`);
                  go('sessions', session.id, 'versions');
                },
              })
            }
          >
            Roll back
          </Button>
          <Button
            kind="quiet"
            icon="down"
            aria-label="Download its files"
            title="Download its files"
            onClick={() =>
              void download(at(session.id, 'versions', chosen, 'archive'), `${session.id}-v${chosen}.tar.gz`, {
                format: 'tar.gz',
              }).catch(sayError)
            }
          />
        </header>
        {version && (
          <p class="soft">
            {count(version.file_count, 'file')}, {bytes(version.total_size_bytes)}
            {version.run_id && (
              <>
                , made by{' '}
                <a href={href('sessions', session.id, 'runs', version.run_id)}>
                  <Name>{version.run_id}</Name>
                </a>
              </>
            )}
          </p>
        )}
        <Problem error={diff.error} />
        {!changed && !diff.error && <Waiting lines={3} />}
        {nothing && <p class="soft">It equals the version before.</p>}
        {changed && changed.data.length > 0 && (
          <>
            <h3>Data</h3>
            <Changes changes={changed.data} />
          </>
        )}
        {changed && (
          <>
            <Files title="Files added" files={changed.files.added} />
            <Files title="Files changed" files={changed.files.changed} />
            <Files title="Files removed" files={changed.files.removed} />
          </>
        )}
      </section>
      {naming.value && (
        <NameDialog
          session={session.id}
          version={naming.value}
          done={() => {
            naming.value = null;
            older.value = null;
            void first.reload();
          }}
        />
      )}
      {forking.value !== null && (
        <ForkDialog
          session={session.id}
          version={forking.value}
          onClose={() => {
            forking.value = null;
          }}
        />
      )}
    </div>
  );
}
