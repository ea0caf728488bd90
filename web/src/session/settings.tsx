/** The settings of a session, its capsule, copies, and its end. */

import { useSignal } from '@preact/signals';
import { at, call, download, send } from '../api.ts';
import { exactly } from '../format.ts';
import { useAction, useLoad } from '../hooks.ts';
import { objectOf } from '../pages/new.tsx';
import { go } from '../router.ts';
import { forgetSession } from '../sessions.ts';
import type { Limits, Session } from '../types.ts';
import { Button, Check, Facts, Form, Problem, Select, TextArea, TextField } from '../ui/basics.tsx';
import { confirm, say, sayError } from '../ui/dialog.tsx';
import type { TabProps } from './page.tsx';
import { ForkDialog } from './versions.tsx';

const LIMITS: [name: keyof Limits, label: string][] = [
  ['memory_mb', 'Memory, MiB'],
  ['cpus', 'Processors'],
  ['pids', 'Processes'],
  ['disk_mb', 'Disk, MiB'],
  ['files', 'Files'],
  ['output_bytes', 'Output, bytes'],
];

interface Values {
  default_timeout: string;
  ttl: string;
  internet: boolean;
  egress: string;
  open: boolean;
  storage: boolean;
  record_code: boolean;
  isolation: string;
  service: string;
  metadata: string;
  limits: { [name: string]: string };
}

function formOf(session: Session): Values {
  return {
    default_timeout: String(session.default_timeout),
    ttl: session.ttl === null ? '' : String(session.ttl),
    internet: session.allowInternetAccess,
    egress: session.egress.allow.join('\n'),
    open: session.allowPublicAccess,
    storage: session.storage,
    record_code: session.record_code,
    isolation: session.isolation,
    service: Array.isArray(session.service) ? JSON.stringify(session.service) : (session.service ?? ''),
    metadata: JSON.stringify(session.metadata, null, 2),
    limits: Object.fromEntries(LIMITS.map(([name]) => [name, String(session.limits[name])])),
  };
}

/** Only what was changed is sent. */
function changesOf(before: Values, now: Values): Record<string, unknown> {
  const changes: Record<string, unknown> = {};
  if (now.default_timeout !== before.default_timeout) changes.default_timeout = Number(now.default_timeout);
  if (now.ttl !== before.ttl) changes.ttl = now.ttl === '' ? null : Number(now.ttl);
  if (now.internet !== before.internet) changes.allowInternetAccess = now.internet;
  if (now.egress !== before.egress) changes.egress = { allow: now.egress.split(/\s+/).filter(Boolean) };
  if (now.open !== before.open) changes.allowPublicAccess = now.open;
  if (now.storage !== before.storage) changes.storage = now.storage;
  if (now.record_code !== before.record_code) changes.record_code = now.record_code;
  if (now.isolation !== before.isolation) changes.isolation = now.isolation;
  if (now.service !== before.service)
    changes.service = now.service.startsWith('[') ? JSON.parse(now.service) : now.service || null;
  if (now.metadata !== before.metadata) changes.metadata = objectOf('Labels', now.metadata);
  const limits = LIMITS.filter(([name]) => now.limits[name] !== before.limits[name]);
  if (limits.length)
    changes.limits = Object.fromEntries(
      limits.map(([name]) => [name, now.limits[name] === '' ? null : Number(now.limits[name])]),
    );
  return changes;
}

/** What is saved now, with what was changed in the form since `sent`. */
function changedSince(sent: Values, form: Values, saved: Values): Values {
  const changed = <T extends object>(now: T, then: T) =>
    Object.fromEntries(Object.entries(now).filter(([name, value]) => value !== then[name as keyof T]));
  const limits = { ...saved.limits, ...changed(form.limits, sent.limits) };
  return { ...saved, ...changed(form, sent), limits };
}

export function SettingsTab({ session, set }: TabProps) {
  const before = useSignal(formOf(session));
  const form = useSignal(before.value);
  const forking = useSignal(false);
  const home = useLoad(
    async (signal) => (await send(at(session.id), { signal })).headers.get('X-ERA-Host'),
    [session.id],
  );
  const about: [string, string][] = home.value ? [['At home at', home.value]] : [];
  const change = (changed: Partial<Values>) => {
    form.value = { ...form.value, ...changed };
  };
  const save = useAction(async () => {
    const sent = form.value;
    const changes = changesOf(before.value, sent);
    if (!Object.keys(changes).length) return;
    const answer = await call<{ metadata: Session }>(at(session.id), { method: 'PATCH', json: changes });
    set(answer.metadata);
    before.value = formOf(answer.metadata);
    form.value = changedSince(sent, form.value, before.value);
    say('The settings are saved.');
  });
  const changed = JSON.stringify(before.value) !== JSON.stringify(form.value);
  const { value } = form;
  return (
    <div class="columns">
      <Form onSubmit={() => void save.run()}>
        <h2>Settings</h2>
        <div class="two">
          <TextField
            label="Timeout of runs"
            hint="Seconds."
            type="number"
            step="any"
            min={0}
            value={value.default_timeout}
            onText={(default_timeout) => change({ default_timeout })}
          />
          <TextField
            label="Expires after"
            hint={
              session.expires_at ? `That is ${exactly(session.expires_at)}.` : 'Seconds without a call. Empty: never.'
            }
            type="number"
            min={1}
            placeholder="never"
            value={value.ttl}
            onText={(ttl) => change({ ttl })}
          />
        </div>
        <Check
          label="Programs may reach the internet"
          checked={value.internet}
          onChange={(internet) => change({ internet })}
        />
        <TextArea
          label="Only these hosts"
          hint="One a line: api.example.com, *.example.com, 203.0.113.0/24. Empty: all."
          rows={3}
          value={value.egress}
          onText={(egress) => change({ egress })}
        />
        <Check label="Anybody may call the public URL" checked={value.open} onChange={(open) => change({ open })} />
        <TextField
          label="Service"
          hint="The command that serves the public URL: a line for the shell, or a JSON list."
          placeholder="none"
          value={value.service}
          onText={(service) => change({ service })}
        />
        <Check
          label="Programs may use the storage"
          checked={value.storage}
          onChange={(storage) => change({ storage })}
        />
        <Check
          label="Keep the code of runs"
          hint="Records of runs show the code or command that ran. Earlier records stay as they are."
          checked={value.record_code}
          onChange={(record_code) => change({ record_code })}
        />
        <Select
          label="Isolation"
          hint="Which sandbox its programs run in."
          value={value.isolation}
          options={[
            ['auto', 'the server’s choice'],
            ['bubblewrap', 'bubblewrap'],
            ['gvisor', 'gVisor'],
          ]}
          onChange={(isolation) => change({ isolation })}
        />
        <fieldset>
          <legend>Limits</legend>
          <div class="three">
            {LIMITS.map(([name, label]) => (
              <TextField
                key={name}
                label={label}
                type="number"
                step="any"
                placeholder="the server’s"
                value={value.limits[name] ?? ''}
                onText={(text) => change({ limits: { ...value.limits, [name]: text } })}
              />
            ))}
          </div>
        </fieldset>
        <TextArea
          label="Labels"
          hint="A JSON object. Programs don’t see it."
          rows={4}
          value={value.metadata}
          onText={(metadata) => change({ metadata })}
        />
        <Problem error={save.error} />
        <footer class="form-foot">
          <Button kind="primary" type="submit" busy={save.busy} disabled={!changed}>
            Save
          </Button>
          {changed && (
            <Button
              onClick={() => {
                form.value = before.value;
                save.clear();
              }}
            >
              Undo
            </Button>
          )}
        </footer>
      </Form>
      <div class="stack">
        <section class="aside-box">
          <h2>Take it along</h2>
          <p class="soft">
            A capsule is the whole session in one archive, which any ERA can import. A copy is a new session here.
          </p>
          <p class="buttons">
            <Button
              icon="down"
              onClick={() => void download(at(session.id, 'capsule'), `${session.id}.tar`).catch(sayError)}
            >
              Capsule
            </Button>
            <Button
              kind="quiet"
              onClick={() =>
                void download(at(session.id, 'capsule'), `${session.id}.tar`, { versions: 'current' }).catch(sayError)
              }
            >
              without history
            </Button>
            <Button
              icon="fork"
              onClick={() => {
                forking.value = true;
              }}
            >
              Copy
            </Button>
          </p>
        </section>
        <section class="aside-box">
          <h2>About it</h2>
          <Facts
            facts={[
              ['Created', exactly(session.created_at)],
              ['Last run', session.last_run_at ? exactly(session.last_run_at) : 'never'],
              ['Files', session.persistent ? 'outlive a run' : 'go with each run'],
              ...about,
            ]}
          />
        </section>
        <section class="aside-box">
          <h2>Delete it</h2>
          <p class="soft">A run of it is killed. For a day it can be restored.</p>
          {session.status === 'deleted' || session.status === 'expired' ? null : (
            <Button
              kind="danger"
              icon="trash"
              onClick={() =>
                confirm({
                  title: `Delete ${session.id}`,
                  text: <p>Its processes are killed and its files are removed. For a day it can be restored.</p>,
                  verb: 'Delete the session',
                  danger: true,
                  act: async () => {
                    await call(at(session.id), { method: 'DELETE' });
                    forgetSession(session.id);
                    say(`${session.id} was deleted.`);
                    go('sessions');
                  },
                })
              }
            >
              Delete
            </Button>
          )}
        </section>
      </div>
      {forking.value && (
        <ForkDialog
          session={session.id}
          onClose={() => {
            forking.value = false;
          }}
        />
      )}
    </div>
  );
}
