/**
 * PDF documents, drawn by pdf.js. It is large, so this file is loaded with the first document.
 *
 * Whoever wrote a document may have meant harm. What reads it is a worker, which ends with the preview. What draws it
 * knows pictures and letters: no scripts, no forms to fill in, no links, nothing from elsewhere. Neither evaluates code,
 * which the page's content security policy would refuse.
 */

import {
  getDocument,
  PasswordException,
  PDFDataRangeTransport,
  type PDFDocumentProxy,
  PDFWorker,
  TextLayer,
} from 'pdfjs-dist/legacy/build/pdf.mjs';
import workerUrl from 'pdfjs-dist/legacy/build/pdf.worker.min.mjs';
import { send } from '../api.ts';

/** Bounds of what one page may take, whatever it says of itself. */
const CANVAS_PIXELS = 16 << 20;
const IMAGE_PIXELS = 48 << 20;
const RATIO = 8;
/** Where fonts, tables of characters and decoders are, of which few documents need any. */
const ASSETS = '/assets/';

/** A file as it was when its preview was loaded. `start` is its beginning, or all of it. */
export interface Source {
  path: string;
  etag: string;
  size: number;
  start: Uint8Array;
}

/** Asks for those parts of a file that are needed for what is shown. They are all of one version of it. */
class Parts extends PDFDataRangeTransport {
  private readonly controller = new AbortController();
  private readonly source: Source;
  private readonly failed: (error: Error) => void;

  constructor(source: Source, failed: (error: Error) => void) {
    super(source.size, source.start.slice());
    this.source = source;
    this.failed = failed;
  }

  override requestDataRange(begin: number, end: number): void {
    const headers = { Range: `bytes=${begin}-${end - 1}`, 'If-Range': this.source.etag };
    const { signal } = this.controller;
    send(this.source.path, { headers, signal })
      .then(async (response) => {
        if (response.status !== 206) {
          void response.body?.cancel();
          throw new Error('The file has changed since it was opened.');
        }
        this.onDataRange(begin, new Uint8Array(await response.arrayBuffer()));
      })
      .catch((error) => {
        if (!signal.aborted) this.failed(error);
      });
  }

  override abort(): void {
    this.controller.abort();
  }
}

export class Pdf {
  private readonly pdf: PDFDocumentProxy;
  readonly count: number;
  /** Height by width of the first page; each page is drawn into a box of this shape. */
  readonly ratio: number;

  private constructor(pdf: PDFDocumentProxy, ratio: number) {
    this.pdf = pdf;
    this.count = pdf.numPages;
    this.ratio = Math.min(RATIO, Math.max(1 / RATIO, ratio));
  }

  /** Open a document; `failed` hears of what goes wrong later. `signal` ends it, even one that keeps its worker busy. */
  static async open(source: Source, signal: AbortSignal, failed: (error: Error) => void): Promise<Pdf> {
    signal.throwIfAborted();
    const port = new Worker(workerUrl, { type: 'module' });
    const parts = source.start.length < source.size ? new Parts(source, failed) : null;
    signal.addEventListener('abort', () => {
      port.terminate();
      parts?.abort();
    });
    port.addEventListener('error', ({ message }) => {
      failed(new Error(`This document can’t be read: ${message.replace(/^Uncaught \w+: /, '')}.`));
    });
    const task = getDocument({
      ...(parts ? { range: parts } : { data: source.start.slice() }),
      worker: new PDFWorker({ port: port as unknown as null }), // its types know of no port
      disableAutoFetch: true,
      disableStream: true,
      useWasm: false,
      useSystemFonts: false,
      maxImageSize: IMAGE_PIXELS,
      cMapUrl: ASSETS,
      standardFontDataUrl: ASSETS,
      wasmUrl: ASSETS,
      verbosity: 0,
    });
    try {
      const pdf = await task.promise;
      const { width, height } = (await pdf.getPage(1)).getViewport({ scale: 1 });
      return new Pdf(pdf, height / width);
    } catch (error) {
      throw error instanceof PasswordException ? new Error('This document wants a password.') : error;
    }
  }

  /** Draw a page as large as it fits into `host`, and its text above it, to be selected and read aloud. */
  async draw(n: number, host: HTMLElement, signal: AbortSignal): Promise<void> {
    const page = await this.pdf.getPage(n);
    if (signal.aborted) return;
    const natural = page.getViewport({ scale: 1 });
    const scale = Math.min(host.clientWidth / natural.width, host.clientHeight / natural.height);
    const viewport = page.getViewport({ scale });
    const { width, height } = viewport;
    const sharp = Math.min(devicePixelRatio, Math.sqrt(CANVAS_PIXELS / (width * height)));
    const canvas = document.createElement('canvas');
    canvas.width = Math.ceil(width * sharp);
    canvas.height = Math.ceil(height * sharp);
    canvas.style.width = `${width}px`;
    canvas.ariaHidden = 'true';
    const text = document.createElement('div');
    text.className = 'pdf-text';
    text.style.setProperty('--total-scale-factor', String(scale));
    const drawing = page.render({ canvas, viewport, transform: [sharp, 0, 0, sharp, 0, 0] });
    const layer = new TextLayer({ textContentSource: page.streamTextContent(), container: text, viewport });
    signal.addEventListener('abort', () => {
      drawing.cancel();
      layer.cancel();
      page.cleanup();
    });
    await Promise.all([drawing.promise, layer.render()]);
    host.replaceChildren(canvas, text);
  }
}
