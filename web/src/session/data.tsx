/** The data of a session: as a tree, as text to edit, and what the last version changed. */

import { useSignal } from '@preact/signals';
import { at, call, send } from '../api.ts';
import { draft, dropDraft, keepDraft } from '../drafts.ts';
import { useAction, useLoad } from '../hooks.ts';
import { parsed } from '../numbers.ts';
import { objectOf } from '../pages/new.tsx';
import { href } from '../router.ts';
import type { Diff, Session } from '../types.ts';
import { Button, Copy, Empty, Problem, Waiting } from '../ui/basics.tsx';
import { confirm, say } from '../ui/dialog.tsx';
import { CodeEditor } from '../ui/editor.tsx';
import { Changes, Tree } from '../ui/tree.tsx';
import type { TabProps } from './page.tsx';
import { withoutCode } from './run.tsx';

export function DataTab({ session, set }: TabProps) {
  const name = `data/${session.id}`;
  const data = withoutCode(session.data);
  const text = useSignal<string | null>(draft(name) ?? null);
  const began = useSignal(session.version);
  const diff = useLoad(
    (signal) => call<Diff>(at(session.id, 'versions', session.version, 'diff'), { signal }),
    [session.id, session.version],
  );

  const put = async (changed: string) => {
    // As it was typed: JavaScript's own numbers can't hold all that JSON can.
    const answer = await call<{ metadata: Session }>(at(session.id), {
      method: 'PATCH',
      body: `{"data": ${changed}}`,
      headers: { 'Content-Type': 'application/json' },
    });
    set(answer.metadata);
    close();
    say(`The data is version ${answer.metadata.version} now.`);
  };
  const save = useAction(async () => {
    if (text.value === null) return;
    const changed = text.value;
    objectOf('This', changed);
    const now = await call<Session>(at(session.id));
    if (now.version === began.value) return put(changed);
    confirm({
      title: 'The data has changed meanwhile',
      text: (
        <p>
          You began with version {began.value}; version {now.version} is in force now. Saving replaces its data with
          yours. It stays in the history.
        </p>
      ),
      verb: 'Replace it',
      act: () => put(changed),
    });
  });
  const open = useAction(async () => {
    const now = parsed(await (await send(at(session.id))).text(), true) as Session;
    began.value = now.version;
    text.value = JSON.stringify(withoutCode(now.data), null, 2);
  });
  const edit = () => void open.run();
  const close = () => {
    text.value = null;
    dropDraft(name);
    save.clear();
  };

  if (text.value !== null)
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
          text={text.value}
          language="json"
          label="Data"
          focus
          onText={(typed) => {
            text.value = typed;
            keepDraft(name, typed);
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
          <Copy text={JSON.stringify(data, null, 2)} label="Copy the data" />
          <Button icon="edit" onClick={edit}>
            Edit
          </Button>
        </header>
        <Problem error={open.error} />
        {Object.keys(data).length ? (
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
