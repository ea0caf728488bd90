/** Pictures, documents and tables that a run wrote. */

import { useEffect, useState } from 'preact/hooks';
import { fileAt, send } from '../api.ts';
import { bytes } from '../format.ts';
import { href } from '../router.ts';
import type { Artifact } from '../types.ts';
import { Name } from '../ui/basics.tsx';
import { Icon } from '../ui/icons.tsx';
import { pictureUrl } from '../ui/pictures.ts';

const LARGEST = 16 << 20;

/** A picture of a session's. In an <img> nothing of it can run, not even of an SVG. */
export function Picture({ path, type, alt }: { path: string; type: string; alt: string }) {
  const [source, setSource] = useState('');
  const [failed, setFailed] = useState('');
  useEffect(() => {
    const controller = new AbortController();
    let url = '';
    send(path, { signal: controller.signal })
      .then(async (response) => {
        url = await pictureUrl(await response.arrayBuffer(), type);
        if (controller.signal.aborted) URL.revokeObjectURL(url);
        else setSource(url);
      })
      .catch((error) => {
        if (!controller.signal.aborted) setFailed(error.message);
      });
    return () => {
      controller.abort();
      if (url) URL.revokeObjectURL(url);
    };
  }, [path, type]);
  if (failed) return <p class="problem-text">{failed}</p>;
  return source ? (
    <img
      class="picture"
      src={source}
      alt={alt}
      onError={() => setFailed('This isn’t a picture that a browser can show.')}
    />
  ) : (
    <span class="picture-waiting" />
  );
}

export function Artifacts({ session, artifacts, more }: { session: string; artifacts: Artifact[]; more: number }) {
  if (!artifacts.length) return null;
  return (
    <ul class="artifacts" aria-label="Artifacts">
      {artifacts.map((artifact) => (
        <li key={artifact.path}>
          <a href={href('sessions', session, 'files', artifact.path)}>
            {artifact.type.startsWith('image/') && artifact.size < LARGEST ? (
              <Picture path={fileAt(session, artifact.path)} type={artifact.type} alt={artifact.path} />
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
