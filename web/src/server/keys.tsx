/** Keys and their owners, for the operator. */

import { useSignal } from '@preact/signals';
import { call } from '../api.ts';
import { useAction, useLoad } from '../hooks.ts';
import type { ApiKey } from '../types.ts';
import { Ago, Button, Choices, Empty, Form, Name, Problem, TextField } from '../ui/basics.tsx';
import { confirm, Dialog, say } from '../ui/dialog.tsx';
import { Listing, Table } from '../ui/listing.tsx';
import { Secret } from './secret.tsx';

const SCOPES: [name: string, hint: string][] = [
  ['read', 'see sessions, files, runs, storage and usage'],
  ['run', 'run code: runs, processes, terminals, contexts'],
  ['write', 'make, change and delete sessions, files and storage'],
  ['admin', 'see to keys, owners and quotas, as the operator does'],
];

function NewSecret({ of, onClose }: { of: ApiKey; onClose: () => void }) {
  return <Secret title={`A key of ${of.owner}’s`} text={of.key ?? ''} copy="Copy the key" onClose={onClose} />;
}

function NewKey({ onClose, onMade }: { onClose: () => void; onMade: () => void }) {
  const owner = useSignal('');
  const description = useSignal('');
  const expires = useSignal('');
  const scopes = useSignal(new Set(['read', 'run', 'write']));
  const made = useSignal<ApiKey | null>(null);
  const create = useAction(async () => {
    made.value = await call<ApiKey>('/api/keys', {
      json: {
        owner: owner.value,
        description: description.value,
        scopes: [...scopes.value],
        expires_at: expires.value.trim() || null,
      },
    });
    onMade();
  });
  if (made.value) return <NewSecret of={made.value} onClose={onClose} />;
  return (
    <Dialog title="New key" onClose={onClose}>
      <Form onSubmit={() => void create.run()}>
        <TextField
          label="Owner"
          hint="Whose key it is. An owner exists once a key names it."
          placeholder="mina"
          value={owner.value}
          onText={(text) => {
            owner.value = text;
          }}
        />
        <TextField
          label="Description"
          placeholder="her laptop"
          value={description.value}
          onText={(text) => {
            description.value = text;
          }}
        />
        <Choices of={SCOPES} chosen={scopes} />
        <TextField
          label="Ends"
          hint="A time such as 2030-01-31T12:00:00Z; never, if left empty."
          placeholder="never"
          value={expires.value}
          onText={(text) => {
            expires.value = text;
          }}
        />
        <Problem error={create.error} />
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" type="submit" busy={create.busy} disabled={!owner.value || scopes.value.size === 0}>
            Create
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

export function KeysPage() {
  const making = useSignal(false);
  const rotated = useSignal<ApiKey | null>(null);
  const loaded = useLoad((signal) => call<{ keys: ApiKey[] }>('/api/keys', { signal }), []);
  const make = () => {
    making.value = true;
  };
  return (
    <section class="page">
      <header class="page-head">
        <h1>Keys</h1>
        <Button kind="primary" icon="plus" onClick={make}>
          New key
        </Button>
      </header>
      <p class="soft lead">
        Everything that is stored has an owner. A call with an owner’s key sees what that owner has, and nothing else.
      </p>
      <Listing
        of={loaded}
        items={(value) => value.keys}
        empty={
          <Empty icon="key" title="No keys yet">
            <p class="soft">With keys of their own, several people share this server without seeing each other.</p>
          </Empty>
        }
      >
        {(keys) => (
          <Table columns={['Owner', 'Description', 'Good for', 'Ends', 'Created', 'Id', { actions: 'Actions' }]}>
            {keys.map((key) => (
              <tr key={key.id}>
                <td>
                  <b>
                    <Name>{key.owner}</Name>
                  </b>
                </td>
                <td class="wide">
                  <Name>{key.description}</Name>
                </td>
                <td>{key.scopes.join(', ')}</td>
                <td class="soft">{key.expires_at?.slice(0, 16).replace('T', ' ') ?? 'never'}</td>
                <td class="soft">
                  <Ago time={key.created_at} />
                </td>
                <td class="mono soft">{key.id}</td>
                <td class="actions">
                  <Button
                    kind="quiet"
                    icon="refresh"
                    aria-label={`Give the key ${key.id} another secret`}
                    title="Rotate"
                    onClick={() =>
                      confirm({
                        title: 'Another secret for this key',
                        text: <p>The one before stays good for an hour, so that there is time to replace it.</p>,
                        verb: 'Rotate',
                        act: async () => {
                          const path = `/api/keys/${encodeURIComponent(key.id)}/rotate`;
                          rotated.value = await call<ApiKey>(path, { json: {} });
                          await loaded.reload();
                        },
                      })
                    }
                  />
                  <Button
                    kind="quiet"
                    icon="trash"
                    aria-label={`Revoke the key ${key.id}`}
                    title="Revoke"
                    onClick={() =>
                      confirm({
                        title: 'Revoke this key',
                        text: (
                          <p>
                            Calls with it are refused at once. What <Name>{key.owner}</Name> has stays.
                          </p>
                        ),
                        verb: 'Revoke',
                        danger: true,
                        act: async () => {
                          await call(`/api/keys/${encodeURIComponent(key.id)}`, { method: 'DELETE' });
                          say('The key is revoked.');
                          await loaded.reload();
                        },
                      })
                    }
                  />
                </td>
              </tr>
            ))}
          </Table>
        )}
      </Listing>
      {rotated.value && (
        <NewSecret
          of={rotated.value}
          onClose={() => {
            rotated.value = null;
          }}
        />
      )}
      {making.value && (
        <NewKey
          onMade={() => void loaded.reload()}
          onClose={() => {
            making.value = false;
          }}
        />
      )}
    </section>
  );
}
