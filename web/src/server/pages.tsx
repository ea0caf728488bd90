/** Pages about the server: what it can do and is doing, keys, who did what, and the storage of programs. */

import { AuditPage } from './audit.tsx';
import { KeysPage } from './keys.tsx';
import { OverviewPage } from './overview.tsx';
import { StoragePage } from './storage.tsx';

export function ServerPages({ page, rest }: { page: string; rest: string[] }) {
  if (page === 'keys') return <KeysPage />;
  if (page === 'audit') return <AuditPage />;
  if (page === 'storage') return <StoragePage rest={rest} />;
  return <OverviewPage />;
}
