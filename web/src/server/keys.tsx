/** Keys and their owners, for the operator. */

import { useSignal } from '@preact/signals';
import { call } from '../api.ts';
import { useAction, useLoad } from '../hooks.ts';
import type { ApiKey } from '../types.ts';
import { Ago, Button, Copy, Empty, Form, Name, Problem, TextField, Waiting } from '../ui/basics.tsx';
import { confirm, Dialog, say } from '../ui/dialog.tsx';

function NewKey({ onClose, onMade }: { onClose: () => void; onMade: () => void }) {
  const owner = useSignal('');
  const description = useSignal('');
  const made = useSignal<ApiKey | null>(null);
  const create = useAction(async () => {
    made.value = await call<ApiKey>('/api/keys', { json: { owner: owner.value, description: description.value } });
    onMade();
  });
  if (made.value)
    return (
      <Dialog title={`A key of ${made.value.owner}’s`} onClose={onClose}>
        <div class="stack">
          <p>It is shown this once only.</p>
          <p class="url-line">
            <code>{made.value.key}</code>
            <Copy text={made.value.key ?? ''} label="Copy the key" />
          </p>
          <footer>
            <Button kind="primary" onClick={onClose}>
              Done
            </Button>
          </footer>
        </div>
      </Dialog>
    );
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
        <Problem error={create.error} />
        <footer>
          <Button onClick={onClose}>Cancel</Button>
          <Button kind="primary" type="submit" busy={create.busy} disabled={!owner.value}>
            Create
          </Button>
        </footer>
      </Form>
    </Dialog>
  );
}

export function KeysPage() {
  const making = useSignal(false);
  const loaded = useLoad((signal) => call<{ keys: ApiKey[] }>('/api/keys', { signal }), []);
  const keys = loaded.value?.keys ?? [];
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
      <Problem error={loaded.error} retry={() => void loaded.reload()} />
      {!loaded.value && !loaded.error && <Waiting />}
      {loaded.value && !keys.length && (
        <Empty icon="key" title="No keys yet">
          <p class="soft">With keys of their own, several people share this server without seeing each other.</p>
        </Empty>
      )}
      {keys.length > 0 && (
        <div class="table-box">
          <table>
            <thead>
              <tr>
                <th>Owner</th>
                <th>Description</th>
                <th>Created</th>
                <th>Id</th>
                <th>
                  <span class="unseen">Actions</span>
                </th>
              </tr>
            </thead>
            <tbody>
              {keys.map((key) => (
                <tr key={key.id}>
                  <td>
                    <b>
                      <Name>{key.owner}</Name>
                    </b>
                  </td>
                  <td>
                    <Name>{key.description}</Name>
                  </td>
                  <td class="soft">
                    <Ago time={key.created_at} />
                  </td>
                  <td class="mono soft">{key.id}</td>
                  <td class="number">
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
            </tbody>
          </table>
        </div>
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
