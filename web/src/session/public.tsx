/** The public URL of a session, and what answers there. */

import { useSignal } from '@preact/signals';
import { at, call } from '../api.ts';
import { useAction, useLoad } from '../hooks.ts';
import type { Session } from '../types.ts';
import { Button, Check, Copy, Problem, TextField } from '../ui/basics.tsx';
import type { TabProps } from './page.tsx';

interface Host {
  url: string;
  port: number;
  /** The same under a host name of the session's own. */
  site_url: string;
}

export function PublicTab({ session, set }: TabProps) {
  const port = useSignal('3000');
  const path = useSignal('/');
  const preview = useSignal('');
  const host = useLoad(
    (signal) => call<Host>(at(session.id, 'host'), { signal, query: { port: port.value } }),
    [session.id, port.value],
  );
  const open = useAction(async (allowed: boolean) => {
    const answer = await call<{ metadata: Session }>(at(session.id), {
      method: 'PATCH',
      json: { allowPublicAccess: allowed },
    });
    set(answer.metadata);
  });
  const below = path.value.startsWith('/') ? path.value : `/${path.value}`;
  const url = host.value ? host.value.url + below : '';
  const site = host.value ? host.value.site_url + below : '';
  return (
    <div class="columns">
      <section class="stack">
        <h2>Public URL</h2>
        <p class="soft">
          Anybody may call it, without a key. A program that listens on the port answers; else the session’s service;
          else the stored code, once for each call.
        </p>
        <Check
          label="Open"
          hint={session.allowPublicAccess ? 'Anybody may call it.' : 'Calls are answered with 403.'}
          checked={session.allowPublicAccess}
          disabled={open.busy}
          onChange={(allowed) => void open.run(allowed)}
        />
        <Problem error={open.error} />
        <div class="two">
          <TextField
            label="Port"
            type="number"
            min={1}
            max={65535}
            value={port.value}
            onText={(text) => {
              port.value = text;
            }}
          />
          <TextField
            label="Path"
            value={path.value}
            onText={(text) => {
              path.value = text;
            }}
          />
        </div>
        <Problem error={host.error} />
        {url && (
          <>
            <p class="url-line">
              <code>{url}</code>
              <Copy text={url} label="Copy the URL" />
            </p>
            <p class="soft">
              The same under a host name of its own, where paths, cookies and logins work as on any site:
            </p>
            <p class="url-line">
              <code>{site}</code>
              <Copy text={site} label="Copy the site’s URL" />
            </p>
          </>
        )}
        <p class="buttons">
          <Button
            kind="primary"
            icon="play"
            disabled={!url || !session.allowPublicAccess}
            onClick={() => {
              preview.value = '';
              requestAnimationFrame(() => {
                preview.value = site;
              });
            }}
          >
            Preview
          </Button>
          <a class="button" href={site || undefined} target="_blank" rel="noreferrer noopener">
            Open in a tab
          </a>
        </p>
        {session.service && (
          <p class="soft">
            Service: <code>{Array.isArray(session.service) ? session.service.join(' ') : session.service}</code>
          </p>
        )}
      </section>
      <section>
        <h2>Preview</h2>
        {preview.value ? (
          <iframe
            class="page-preview framed"
            title="What the public URL answers"
            // It is another origin than this page's in any case; with its own it can have storage and cookies.
            sandbox="allow-scripts allow-forms allow-same-origin"
            referrerpolicy="no-referrer"
            src={preview.value}
          />
        ) : (
          <p class="soft">
            Shown in a frame that can’t reach this page, its key or its storage. A preview calls the session as anybody
            would.
          </p>
        )}
      </section>
    </div>
  );
}
