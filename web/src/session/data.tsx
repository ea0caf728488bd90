/** The data of a session: as a tree, as text to edit, and what the last version changed. */

import { useSignal } from '@preact/signals';
import { at, call, send } from '../api.ts';
import { type Draft, draftOf, draftSaved } from '../drafts.ts';
import { useAction, useLoad } from '../hooks.ts';
import { parsed } from '../numbers.ts';
import { objectOf } from '../pages/new.tsx';
import { href } from '../router.ts';
import type { Diff, Session, Version } from '../types.ts';
import { Button, Copy, Empty, Problem, Waiting } from '../ui/basics.tsx';
import { confirm, say } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Changes, Tree } from '../ui/tree.tsx';
import type { TabProps } from './page.tsx';

export function DataTab({ session, set }: TabProps) {
  // A version's data is the user's own; a session's also shows the stored code.
  const kept = useLoad(
    (signal) => call<Version>(at(session.id, 'versions', session.version), { signal }),
    [session.id, session.version],
  );
  const data = kept.value?.data ?? {};
  const draft = draftOf(`data/${session.id}`);
  // What the editor was opened with, until something is typed.
  const opened = useSignal<Draft | undefined>(undefined);
  const current = () => draft.value ?? opened.value;
  const diff = useLoad(
    (signal) => call<Diff>(at(session.id, 'versions', session.version, 'diff'), { signal }),
    [session.id, session.version],
  );

  const put = async (changed: string, known: number) => {
    // As it was typed: JavaScript's own numbers can't hold all that JSON can.
    const answer = await call<{ metadata: Session }>(at(session.id), {
      method: 'PATCH',
      body: `{"data": ${changed.trim() || '{}'}}`,
      headers: { 'Content-Type': 'application/json' },
    });
    set(answer.metadata);
    const { version } = answer.metadata;
    draftSaved(draft, changed, version);
    if (!draft.value) close();
    // The save waited for the run under way, and then replaced what that had left.
    if (version > known + 1)
      say(
        `The data is version ${version} now. Version ${version - 1}, which it replaces, came while it was saved.`,
        true,
      );
    else say(`The data is version ${version} now.`);
  };
  const save = useAction(async () => {
    const { text: changed, base } = current() ?? {};
    if (changed === undefined) return;
    objectOf('This', changed);
    const now = await call<Session>(at(session.id));
    if (now.version === base) return put(changed, now.version);
    confirm({
      title: 'The data has changed meanwhile',
      text: (
        <p>
          You began with version {base}; version {now.version} is in force now. Saving replaces its data with yours. It
          stays in the history.
        </p>
      ),
      verb: 'Replace it',
      act: () => put(changed, now.version),
    });
  });
  const open = useAction(async () => {
    const { version } = await call<Session>(at(session.id));
    const now = parsed(await (await send(at(session.id, 'versions', version))).text(), true) as Version;
    opened.value = { text: JSON.stringify(now.data, null, 2), base: version };
  });
  const edit = () => void open.run();
  const close = () => {
    opened.value = draft.value = undefined;
    save.clear();
  };

  const shown = current();
  if (shown)
    return (
      <div class="pane alone">
        <div class="pane-head">
          <Button kind="primary" icon="check" busy={save.busy} onClick={() => void save.run()} title="Ctrl S">
            Save
          </Button>
          <Button onClick={close}>Cancel</Button>
          <span class="soft">A JSON object. Saving it makes the next version.</span>
        </div>
        <Problem error={save.error} />
        <CodeEditor
          text={shown.text}
          language="json"
          label="Data"
          focus
          onText={(typed) => {
            draft.value = { text: typed, base: (draft.value ?? shown).base };
          }}
          onSave={() => void save.run()}
        />
      </div>
    );
  return (
    <div class="columns">
      <section>
        <header class="section-head">
          <h2>Now</h2>
          <span class="push" />
          {kept.value && <Copy text={JSON.stringify(data, null, 2)} label="Copy the data" />}
          <Button icon="edit" onClick={edit}>
            Edit
          </Button>
        </header>
        <Problem error={open.error ?? kept.error} />
        {!kept.value ? (
          !kept.error && <Waiting lines={3} />
        ) : Object.keys(data).length ? (
          <Tree value={data} />
        ) : (
          <Empty icon="data" title="No data yet">
            <p class="soft">
              Programs find it in <code>.session_data.json</code>. What they write there is kept.
            </p>
            <Button icon="edit" onClick={edit}>
              Write some
            </Button>
          </Empty>
        )}
      </section>
      <section>
        <header class="section-head">
          <h2>What version {session.version} changed</h2>
          <span class="push" />
          <a class="quiet-link" href={href('sessions', session.id, 'versions')}>
            All versions
          </a>
        </header>
        <Problem error={diff.error} />
        {diff.value ? (
          diff.value.data.length ? (
            <Changes changes={diff.value.data} />
          ) : (
            <p class="soft">Nothing of the data.</p>
          )
        ) : (
          !diff.error && <Waiting lines={3} />
        )}
      </section>
    </div>
  );
}
