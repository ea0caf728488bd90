/** URLs of pictures that a session has made. */

/**
 * A URL for an <img>, in which nothing of a picture can run; to be revoked. Of SVG it is a `data:` URL: in a tab of its
 * own SVG is a document, which then has no origin. By a `blob:` URL it would have the dashboard's.
 */
export function pictureUrl(content: BlobPart, type: string): Promise<string> {
  const blob = new Blob([content], { type });
  if (!type.startsWith('image/svg')) return Promise.resolve(URL.createObjectURL(blob));
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(String(reader.result));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}
