/** The page that creates a session, or makes one of a capsule. */

import { useSignal } from '@preact/signals';
import { useRef } from 'preact/hooks';
import { call } from '../api.ts';
import { useAction } from '../hooks.ts';
import { FIRST, languages } from '../languages.ts';
import { parsed } from '../numbers.ts';
import { go } from '../router.ts';
import type { JsonObject, Session } from '../types.ts';
import { Button, Check, Form, Problem, TextArea, TextField } from '../ui/basics.tsx';
import { say } from '../ui/dialog.tsx';

/**
 * An object that somebody typed as JSON, whose numbers are written again as they were typed; an empty text is an empty
 * object. Throws an Error that says what is wrong.
 */
export function objectOf(name: string, text: string): JsonObject {
  if (!text.trim()) return {};
  let value: unknown;
  try {
    value = parsed(text, true);
  } catch (error) {
    throw new Error(`${name} isn’t JSON: ${(error as Error).message}`);
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new Error(`${name} must be an object, like {"n": 1}.`);
  return value as JsonObject;
}

const words = (text: string) => text.split(/[\s,]+/).filter(Boolean);

export function NewPage() {
  const id = useSignal('');
  const language = useSignal('python');
  const data = useSignal('');
  const labels = useSignal('');
  const packages = useSignal('');
  const ttl = useSignal('');
  const internet = useSignal(true);
  const open = useSignal(true);
  const persistent = useSignal(true);
  const recordCode = useSignal(true);
  const sample = useSignal(true);
  const file = useRef<HTMLInputElement>(null);
  const chosen = languages.value.find((each) => each.name === language.value);

  const create = useAction(async () => {
    const wanted = words(packages.value);
    const session = await call<Session>('/api/sessions', {
      json: {
        language: language.value,
        ...(id.value ? { session_id: id.value } : {}),
        data: objectOf('Data', data.value),
        metadata: Object.fromEntries(
          words(labels.value).map((label) => {
            const at = label.indexOf('=');
            if (at < 1) throw new Error(`'${label}' isn’t a label: write name=value.`);
            return [label.slice(0, at), label.slice(at + 1)];
          }),
        ),
        persistent: persistent.value,
        allowInternetAccess: internet.value,
        allowPublicAccess: open.value,
        record_code: recordCode.value,
        ...(ttl.value ? { ttl: Number(ttl.value) } : {}),
        ...(wanted.length && chosen?.packages ? { setup: { [chosen.packages]: wanted } } : {}),
      },
    });
    const code = FIRST[language.value];
    if (sample.value && code)
      await call(`/api/sessions/${encodeURIComponent(session.id)}/code`, { method: 'PUT', json: { code } });
    go('sessions', session.id);
  });
  const bringIn = useAction(async () => {
    const capsule = file.current?.files?.[0];
    if (!capsule) return;
    const session = await call<Session>('/api/sessions/import', {
      method: 'POST',
      body: capsule,
      headers: { 'Content-Type': 'application/x-tar' },
      query: { id: id.value },
    });
    say(`The capsule is session ${session.id} now.`);
    go('sessions', session.id);
  });

  return (
    <section class="page narrow">
      <header class="page-head">
        <h1>New session</h1>
      </header>
      <Form onSubmit={() => void create.run()}>
        <fieldset class="choices">
          <legend>Language</legend>
          {(languages.value.length ? languages.value : []).map((each) => (
            <label key={each.name} class={each.available ? 'choice' : 'choice off'} title={each.reason ?? ''}>
              <input
                type="radio"
                name="language"
                value={each.name}
                checked={each.name === language.value}
                disabled={!each.available}
                onChange={() => {
                  language.value = each.name;
                }}
              />
              <span>{each.title}</span>
              <small>{each.available ? each.version : 'not here'}</small>
            </label>
          ))}
        </fieldset>
        <TextField
          label="Id"
          hint="Letters, digits, _, : and -. Left out, the server chooses one."
          placeholder="chosen by the server"
          maxLength={128}
          value={id.value}
          onText={(text) => {
            id.value = text;
          }}
        />
        {chosen?.packages && (
          <TextField
            label="Packages"
            hint={`Installed with ${chosen.packages} before the first run: names, with or without versions.`}
            placeholder={
              chosen.packages === 'pip'
                ? 'requests pandas>=2'
                : chosen.packages === 'npm'
                  ? 'axios zod@^4'
                  : 'rsc.io/quote@v1.5.2'
            }
            value={packages.value}
            onText={(text) => {
              packages.value = text;
            }}
          />
        )}
        <Check
          label="Store a first program"
          hint="It counts its runs in the session’s data."
          checked={sample.value}
          onChange={(checked) => {
            sample.value = checked;
          }}
        />
        <details>
          <summary>More</summary>
          <div class="stack">
            <TextArea
              label="Data"
              hint="What programs read and change: a JSON object."
              placeholder={'{"count": 0}'}
              value={data.value}
              onText={(text) => {
                data.value = text;
              }}
            />
            <TextField
              label="Labels"
              hint="To find it by. Programs don’t see them."
              placeholder="team=blue stage=test"
              value={labels.value}
              onText={(text) => {
                labels.value = text;
              }}
            />
            <TextField
              label="Expires after"
              hint="Seconds without a call. Left out: never."
              type="number"
              min={1}
              placeholder="never"
              value={ttl.value}
              onText={(text) => {
                ttl.value = text;
              }}
            />
            <Check
              label="Programs may reach the internet"
              checked={internet.value}
              onChange={(checked) => {
                internet.value = checked;
              }}
            />
            <Check
              label="Anybody may call its public URL"
              checked={open.value}
              onChange={(checked) => {
                open.value = checked;
              }}
            />
            <Check
              label="Files outlive a run"
              hint="Data always does."
              checked={persistent.value}
              onChange={(checked) => {
                persistent.value = checked;
              }}
            />
            <Check
              label="Keep the code of runs"
              hint="Records of runs show the code or command that ran."
              checked={recordCode.value}
              onChange={(checked) => {
                recordCode.value = checked;
              }}
            />
          </div>
        </details>
        <Problem error={create.error} />
        <footer class="form-foot">
          <Button kind="primary" type="submit" busy={create.busy}>
            Create session
          </Button>
        </footer>
      </Form>
      <section class="aside-box">
        <h2>From a capsule</h2>
        <p class="soft">
          A capsule is a whole session in one archive: data, files, versions and records. The id above is used, if there
          is one. Its public URL is closed until you open it.
        </p>
        <label class="file-input">
          <span class="unseen">Capsule</span>
          <input type="file" ref={file} accept=".tar,application/x-tar" aria-label="Capsule" />
        </label>
        <Problem error={bringIn.error} />
        <Button icon="up" busy={bringIn.busy} onClick={() => void bringIn.run()}>
          Import
        </Button>
      </section>
    </section>
  );
}
