/** The inbox of a session: its settings, its deliveries, and running one of them again. */

import { useSignal } from '@preact/signals';
import { ApiError, at, call } from '../api.ts';
import { bytes, count, exactly } from '../format.ts';
import { useAction, useInterval, useLoad } from '../hooks.ts';
import { href } from '../router.ts';
import type { Delivery, DeliveryContent, Inbox, Page } from '../types.ts';
import {
  Ago,
  Button,
  Copy,
  Empty,
  Facts,
  Form,
  Name,
  Problem,
  Select,
  Status,
  TextField,
  Waiting,
} from '../ui/basics.tsx';
import { confirm, Dialog, say, sayError } from '../ui/dialog.tsx';
import { Listing } from '../ui/listing.tsx';
import { Printed } from '../ui/output.tsx';
import type { TabProps } from './page.tsx';

const REFRESH_MS = 3000;

function InboxDialog({ session, inbox, done }: { session: string; inbox: Inbox | null; done: () => void }) {
  const scheme = useSignal(inbox?.verify?.scheme ?? '');
  const secret = useSignal('');
  const retries = useSignal(String(inbox?.retries ?? 5));
  const save = useAction(async () => {
    await call(at(session, 'inbox'), {
      method: 'PUT',
      json: {
        ...(scheme.value ? { verify: { scheme: scheme.value, secret: secret.value } } : {}),
        retries: Number(retries.value),
      },
    });
    say('The inbox takes deliveries.');
    done();
  });
  return (
    <Dialog title="Inbox" onClose={done}>
      <Form onSubmit={() => void save.run()}>
        <Select
          label="Deliveries are signed"
          hint="Others are refused, and not even stored."
          value={scheme.value}
          options={[
            ['', 'not at all: anybody may deliver'],
            ['github', 'as GitHub does it'],
            ['stripe', 'as Stripe does it'],
            ['hmac', 'with HMAC-SHA256'],
          ]}
          onChange={(value) => {
            scheme.value = value;
          }}
        />
        {scheme.value && (
          <TextField
            label="Secret"
            type="password"
            hint="What the sender signs with. It is never shown again."
            value={secret.value}
            onText={(text) => {
              secret.value = text;
            }}
          />
        )}
        <TextField
          label="Retries"
          hint="How often a delivery that failed is tried again: 0 to 20."
          type="number"
          min={0}
          max={20}
          value={retries.value}
          onText={(text) => {
            retries.value = text;
          }}
        />
        <Problem error={save.error} />
        <footer>
          <Button onClick={done}>Cancel</Button>
          <Button kind="primary" type="submit" busy={save.busy}>
            Save
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

function Content({ session, id, changed }: { session: string; id: string; changed: () => void }) {
  const path = at(session, 'inbox', 'deliveries', id);
  const loaded = useLoad((signal) => call<DeliveryContent>(path, { signal }), [path]);
  const delivery = loaded.value;
  useInterval(() => void loaded.refresh(), delivery && !delivery.ended_at ? REFRESH_MS : null);
  const replay = useAction(async () => {
    await call(`${path}/replay`, { method: 'POST' });
    say('The delivery is run once more.');
    await loaded.reload();
    changed();
  });
  if (!delivery) return loaded.error ? <Problem error={loaded.error} /> : <Waiting />;
  return (
    <>
      <header class="section-head wrap">
        <h2>
          {delivery.method} <Name>{delivery.path}</Name>
        </h2>
        <Status>{delivery.status}</Status>
        <span class="push" />
        <Button
          icon="refresh"
          busy={replay.busy}
          disabled={delivery.status === 'running'}
          onClick={() => void replay.run()}
        >
          Replay
        </Button>
      </header>
      <Problem error={loaded.error ?? replay.error} />
      <Facts
        facts={[
          ['Id', <code key="id">{delivery.id}</code>],
          ['Received', exactly(delivery.received_at)],
          ['Attempts', delivery.attempts],
          ['Next attempt', delivery.next_attempt_at ? exactly(delivery.next_attempt_at) : '–'],
          ['Answered', delivery.answer_status ?? '–'],
          ['Why', delivery.reason ?? '–'],
          ['Sender’s id', delivery.sender_id ? <Name key="sender">{delivery.sender_id}</Name> : '–'],
          ['Size', bytes(delivery.size)],
        ]}
      />
      {delivery.run_ids.length > 0 && (
        <>
          <h3>Runs</h3>
          <ul class="plain-list">
            {delivery.run_ids.map((run) => (
              <li key={run}>
                <a href={href('sessions', session, 'runs', run)}>{run}</a>
              </li>
            ))}
          </ul>
        </>
      )}
      <h3>Body</h3>
      {delivery.body ? (
        delivery.body_encoding === 'utf-8' ? (
          <Printed text={delivery.body} label="Body" />
        ) : (
          <p class="soft">{bytes(delivery.size)} that aren’t text.</p>
        )
      ) : (
        <p class="soft">Empty.</p>
      )}
      <details>
        <summary>Headers</summary>
        <dl class="facts">
          {delivery.headers.map(([name, value], index) => (
            <div key={`${index}/${name}`}>
              <dt>{name}</dt>
              <dd>
                <Name>{value}</Name>
              </dd>
            </div>
          ))}
        </dl>
      </details>
    </>
  );
}

export function InboxTab({ session, rest }: TabProps) {
  const status = useSignal('');
  const editing = useSignal(false);
  const inbox = useLoad(
    (signal) =>
      call<Inbox>(at(session.id, 'inbox'), { signal }).catch((error) => {
        if (error instanceof ApiError && error.code === 'no_inbox') return null;
        throw error;
      }),
    [session.id],
  );
  const list = useLoad(
    (signal) =>
      inbox.value
        ? call<Page & { deliveries: Delivery[] }>(at(session.id, 'inbox', 'deliveries'), {
            signal,
            query: { status: status.value, limit: 200 },
          })
        : Promise.resolve({ deliveries: [], count: 0, next_cursor: null }),
    [session.id, status.value, Boolean(inbox.value)],
  );
  const reload = () => Promise.all([inbox.reload(), list.reload()]);
  useInterval(() => void Promise.all([inbox.refresh(), list.refresh()]), inbox.value ? REFRESH_MS : null);
  const dialog = editing.value && (
    <InboxDialog
      session={session.id}
      inbox={inbox.value ?? null}
      done={() => {
        editing.value = false;
        void reload();
      }}
    />
  );
  const edit = () => {
    editing.value = true;
  };
  const problem = <Problem error={inbox.error} retry={() => void inbox.reload()} />;
  if (inbox.value === undefined) return inbox.error ? problem : <Waiting />;
  if (inbox.value === null)
    return (
      <>
        {problem}
        <Empty icon="inbox" title="No inbox">
          <p class="soft">
            An inbox takes what webhooks deliver, stores it before it answers, and runs the stored code for each, in
            order, again if it must.
          </p>
          <Button kind="primary" onClick={edit}>
            Open an inbox
          </Button>
        </Empty>
        {dialog}
      </>
    );
  const { url, verify, retries, deliveries } = inbox.value;
  const found = list.value?.deliveries ?? [];
  const chosen = rest[0] ?? found[0]?.id;
  return (
    <div class="columns timeline-columns">
      <section>
        <header class="section-head wrap">
          <h2>Deliveries</h2>
          <span class="push" />
          <Button icon="edit" onClick={edit}>
            Change
          </Button>
          <Button
            kind="quiet"
            icon="trash"
            aria-label="Remove the inbox"
            title="Remove the inbox"
            onClick={() =>
              confirm({
                title: 'Remove the inbox',
                text: <p>All its deliveries go with it, also those that wait.</p>,
                verb: 'Remove',
                danger: true,
                act: async () => {
                  await call(at(session.id, 'inbox'), { method: 'DELETE' });
                  await reload().catch(sayError);
                },
              })
            }
          />
        </header>
        {problem}
        <p class="url-line">
          <code>{url}</code>
          <Copy text={url} label="Copy the URL" />
        </p>
        <p class="soft">
          {verify ? `Signed (${verify.scheme}, in ${verify.header})` : 'Unsigned: anybody may deliver'},{' '}
          {count(retries, 'retry', 'retries')}. {deliveries.pending} waiting, {deliveries.running} running,{' '}
          {deliveries.done} done, {deliveries.failed} failed.
        </p>
        <Select
          label="Status"
          hidden
          value={status.value}
          options={[
            ['', 'Any status'],
            ['pending', 'Pending'],
            ['running', 'Running'],
            ['done', 'Done'],
            ['failed', 'Failed'],
          ]}
          onChange={(value) => {
            status.value = value;
          }}
        />
        <Listing of={list} items={() => found} empty={<p class="soft">None.</p>}>
          {() => (
            <ol class="timeline" aria-label="Deliveries">
              {found.map((delivery) => (
                <li key={delivery.id}>
                  <a
                    href={href('sessions', session.id, 'inbox', delivery.id)}
                    aria-current={delivery.id === chosen ? 'true' : undefined}
                  >
                    <Status>{delivery.status}</Status>
                    <Name>{delivery.path}</Name>
                    <span class="push" />
                    <span class="soft">
                      <Ago time={delivery.received_at} />
                    </span>
                  </a>
                </li>
              ))}
            </ol>
          )}
        </Listing>
      </section>
      <section>
        {chosen && <Content key={chosen} session={session.id} id={chosen} changed={() => void reload()} />}
      </section>
      {dialog}
    </div>
  );
}
