/** Pictures, documents and tables that a run wrote. */

import { fileAt, send } from '../api.ts';
import { bytes } from '../format.ts';
import { href } from '../router.ts';
import type { Artifact } from '../types.ts';
import { Name } from '../ui/basics.tsx';
import { Icon } from '../ui/icons.tsx';
import { Picture } from '../ui/pictures.tsx';

const LARGEST = 16 << 20;

/** A file of a session's that is a picture. */
export function PictureFile({ path, type, alt }: { path: string; type: string; alt: string }) {
  const load = async (signal: AbortSignal) => (await send(path, { signal })).arrayBuffer();
  return <Picture of={path} load={load} type={type} alt={alt} />;
}

export function Artifacts({ session, artifacts, more }: { session: string; artifacts: Artifact[]; more: number }) {
  if (!artifacts.length) return null;
  return (
    <ul class="artifacts" aria-label="Artifacts">
      {artifacts.map((artifact) => (
        <li key={artifact.path}>
          <a href={href('sessions', session, 'files', artifact.path)}>
            {artifact.type.startsWith('image/') && artifact.size < LARGEST ? (
              <PictureFile path={fileAt(session, artifact.path)} type={artifact.type} alt={artifact.path} />
            ) : (
              <Icon name={/csv|tab|parquet|sheet/.test(artifact.type) ? 'table' : 'file'} size={28} />
            )}
            <span>
              <Name>{artifact.path}</Name> <small class="soft">{bytes(artifact.size)}</small>
            </span>
          </a>
        </li>
      ))}
      {more > 0 && <li class="soft">and {more} more</li>}
    </ul>
  );
}
