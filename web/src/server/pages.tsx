/** Pages about the server: what it can do and is doing, what is used of it, keys, webhooks, who did what, the storage. */

import { AuditPage } from './audit.tsx';
import { KeysPage } from './keys.tsx';
import { OverviewPage } from './overview.tsx';
import { StoragePage } from './storage.tsx';
import { UsagePage } from './usage.tsx';
import { WebhooksPage } from './webhooks.tsx';

export function ServerPages({ page, rest }: { page: string; rest: string[] }) {
  if (page === 'keys') return <KeysPage />;
  if (page === 'audit') return <AuditPage />;
  if (page === 'storage') return <StoragePage rest={rest} />;
  if (page === 'usage') return <UsagePage />;
  if (page === 'webhooks') return <WebhooksPage id={rest[0]} />;
  return <OverviewPage />;
}
