/** Webhooks: where the server tells what happens to one's sessions, and how that goes. */

import { useSignal } from '@preact/signals';
import { call } from '../api.ts';
import { useAction, useInterval, useLoad } from '../hooks.ts';
import { go, href } from '../router.ts';
import type { Notice, Webhook } from '../types.ts';
import { Ago, Button, Choices, Empty, Form, Name, Problem, Status, TextField } from '../ui/basics.tsx';
import { confirm, Dialog, say, sayError } from '../ui/dialog.tsx';
import { Listing, Table } from '../ui/listing.tsx';
import { Secret } from './secret.tsx';

const REFRESH_MS = 2000;
const EVENTS: [name: string, hint: string][] = [
  ['session.created', 'a session was made, copied or imported'],
  ['session.expired', 'a session has reached the end of its time'],
  ['run.ended', 'a run has ended, well or not'],
  ['quota.reached', 'a quota of yours was reached'],
];

const at = (...parts: string[]) => ['/api/webhooks', ...parts.map(encodeURIComponent)].join('/');

function NewWebhook({ onClose, onMade }: { onClose: () => void; onMade: () => void }) {
  const url = useSignal('');
  const description = useSignal('');
  const events = useSignal(new Set(EVENTS.map(([name]) => name)));
  const made = useSignal<Webhook | null>(null);
  const create = useAction(async () => {
    const json = { url: url.value.trim(), description: description.value, events: [...events.value] };
    made.value = await call<Webhook>(at(), { json });
    onMade();
  });
  if (made.value)
    return (
      <Secret
        title="What its notices are signed with"
        text={made.value.secret ?? ''}
        copy="Copy the secret"
        onClose={onClose}
      />
    );
  return (
    <Dialog title="New webhook" onClose={onClose}>
      <Form onSubmit={() => void create.run()}>
        <TextField
          label="URL"
          hint="Where notices are POSTed: an address that programs may reach, too."
          placeholder="https://example.com/era"
          value={url.value}
          onText={(text) => {
            url.value = text;
          }}
        />
        <Choices of={EVENTS} chosen={events} />
        <TextField
          label="Description"
          placeholder="what it is for"
          value={description.value}
          onText={(text) => {
            description.value = text;
          }}
        />
        <Problem error={create.error} />
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button
            kind="primary"
            type="submit"
            busy={create.busy}
            disabled={!url.value.trim() || events.value.size === 0}
          >
            Create
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

/** What waits to be told to a webhook, was told or was given up. */
function Deliveries({ webhook }: { webhook: Webhook }) {
  const loaded = useLoad(
    (signal) => call<{ deliveries: Notice[] }>(at(webhook.id, 'deliveries'), { signal }),
    [webhook.id],
  );
  useInterval(() => void loaded.refresh(), REFRESH_MS);
  const replay = async (notice: Notice) => {
    try {
      await call(at(webhook.id, 'deliveries', notice.id, 'replay'), { method: 'POST' });
      say('It is sent once more.');
      await loaded.reload();
    } catch (error) {
      sayError(error);
    }
  };
  return (
    <section aria-label="Notices">
      <h2 class="one-line">
        <Name>{webhook.url}</Name>
      </h2>
      <Listing of={loaded} items={(value) => value.deliveries} empty={<p class="soft">Nothing was sent yet.</p>}>
        {(notices) => (
          <Table
            columns={['Event', 'Status', { number: 'Tries' }, { number: 'Answer' }, 'When', { actions: 'Actions' }]}
          >
            {notices.map((notice) => (
              <tr key={notice.id}>
                <td>
                  {notice.event}
                  {notice.reason && <p class="problem-text reason">{notice.reason}</p>}
                </td>
                <td>
                  <Status>{notice.status}</Status>
                </td>
                <td class="number">{notice.tries}</td>
                <td class="number">{notice.http_status ?? '–'}</td>
                <td class="soft">
                  <Ago time={notice.ended_at ?? notice.created_at} />
                </td>
                <td class="actions">
                  <Button
                    kind="quiet"
                    icon="refresh"
                    aria-label={`Replay ${notice.event}`}
                    title={notice.status === 'pending' ? 'Send now' : 'Send once more'}
                    onClick={() => void replay(notice)}
                  />
                </td>
              </tr>
            ))}
          </Table>
        )}
      </Listing>
    </section>
  );
}

export function WebhooksPage({ id }: { id: string | undefined }) {
  const making = useSignal(false);
  const loaded = useLoad((signal) => call<{ webhooks: Webhook[] }>(at(), { signal }), []);
  useInterval(() => void loaded.refresh(), REFRESH_MS);
  const webhooks = loaded.value?.webhooks ?? [];
  const shown = webhooks.find((each) => each.id === id) ?? webhooks[0];
  const remove = (webhook: Webhook) =>
    confirm({
      title: 'Delete this webhook',
      text: (
        <p>
          Nothing more is sent to <Name>{webhook.url}</Name>, not even what waits.
        </p>
      ),
      verb: 'Delete',
      danger: true,
      act: async () => {
        await call(at(webhook.id), { method: 'DELETE' });
        say('The webhook is deleted.');
        go('webhooks');
        await loaded.reload();
      },
    });
  return (
    <section class="page">
      <header class="page-head">
        <h1>Webhooks</h1>
        <Button
          kind="primary"
          icon="plus"
          onClick={() => {
            making.value = true;
          }}
        >
          New webhook
        </Button>
      </header>
      <p class="soft lead">
        The server posts what happens to your sessions to a URL of yours: signed, and again until it is accepted.
      </p>
      <Listing
        of={loaded}
        items={() => webhooks}
        empty={
          <Empty icon="webhook" title="No webhooks yet">
            <p class="soft">
              With one, your own server learns when a run has ended, without asking.{' '}
              <a href="/docs/guide/webhooks.html">More</a>
            </p>
          </Empty>
        }
      >
        {() =>
          shown && (
            <div class="columns timeline-columns">
              <ol class="timeline" aria-label="Webhooks">
                {webhooks.map((each) => (
                  <li key={each.id} class="with-button">
                    <a href={href('webhooks', each.id)} aria-current={each.id === shown.id ? 'true' : undefined}>
                      <span class="one-line">
                        <Name>{each.url}</Name>
                      </span>
                      <span class="soft">
                        <Name>{each.description || each.events.join(', ')}</Name>
                      </span>
                      <span class="soft">
                        {each.pending} waiting, {each.failed} given up{each.dropped ? `, ${each.dropped} lost` : ''}
                      </span>
                    </a>
                    <Button
                      kind="quiet"
                      icon="trash"
                      aria-label={`Delete the webhook ${each.id}`}
                      title="Delete"
                      onClick={() => remove(each)}
                    />
                  </li>
                ))}
              </ol>
              <Deliveries key={shown.id} webhook={shown} />
            </div>
          )
        }
      </Listing>
      {making.value && (
        <NewWebhook
          onMade={() => void loaded.reload()}
          onClose={() => {
            making.value = false;
          }}
        />
      )}
    </section>
  );
}
