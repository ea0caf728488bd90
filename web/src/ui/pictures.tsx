/** Pictures that a session has made. */

import { useEffect, useState } from 'preact/hooks';

export const NO_PICTURE = 'This isn’t a picture that a browser can show.';

/**
 * A URL for an <img>, in which nothing of a picture can run; to be revoked. Of SVG it is a `data:` URL: in a tab of its
 * own SVG is a document, which then has no origin. By a `blob:` URL it would have the dashboard's.
 */
function pictureUrl(content: BlobPart, type: string): Promise<string> {
  const blob = new Blob([content], { type });
  if (!type.startsWith('image/svg')) return Promise.resolve(URL.createObjectURL(blob));
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(String(reader.result));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

interface Props {
  /** What tells this picture from others. */
  of: string;
  load: (signal: AbortSignal) => Promise<BlobPart>;
  type: string;
  alt: string;
  class?: string;
}

/** A picture, or why it can't be shown. */
export function Picture({ of, load, type, alt, class: name = '' }: Props) {
  const [source, setSource] = useState('');
  const [failed, setFailed] = useState('');
  useEffect(() => {
    const controller = new AbortController();
    let url = '';
    load(controller.signal)
      .then(async (content) => {
        url = await pictureUrl(content, type);
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
  }, [of, type]);
  if (failed) return <p class="problem-text">{failed}</p>;
  if (!source) return <span class="picture-waiting" />;
  return <img class={`picture ${name}`} src={source} alt={alt} onError={() => setFailed(NO_PICTURE)} />;
}
