// Comes before pdf.js in its worker: bounds what one stream of a document unpacks to, so that a few KiB can't become
// gigabytes. pdf.js unpacks with the browser's decompression, and where that fails by itself, into arrays that double.
// After an error it goes on with a page that lacks a part; so the preview hears of this one as well.
{
  const bound = 256 << 20;

  function check(bytes) {
    if (bytes <= bound) return;
    const error = new RangeError('a part of it is larger than 256 MiB');
    reportError(error);
    throw error;
  }

  globalThis.Uint8Array = new Proxy(Uint8Array, {
    construct(array, given, made) {
      if (typeof given[0] === 'number') check(given[0]);
      return Reflect.construct(array, given, made === globalThis.Uint8Array ? array : made);
    },
  });

  globalThis.DecompressionStream = class extends DecompressionStream {
    get readable() {
      let bytes = 0;
      const counted = new TransformStream({
        transform(chunk, controller) {
          bytes += chunk.byteLength;
          check(bytes);
          controller.enqueue(chunk);
        },
      });
      return super.readable.pipeThrough(counted);
    }
  };
}
