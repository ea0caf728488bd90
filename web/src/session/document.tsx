/** The pages of a PDF document; those in view are drawn. */

import { useSignal } from '@preact/signals';
import { useEffect, useLayoutEffect, useRef, useState } from 'preact/hooks';
import { bytes } from '../format.ts';
import { Button, Problem, Waiting } from '../ui/basics.tsx';
import type { Pdf, Source } from './pdf.ts';

const GAP = 12;
/** Browsers don't lay out boxes of any height. */
const PAGES = 10_000;
/** How long it is quiet before pages count as looked at: a key or a click scrolls over all that lie between. */
const QUIET_MS = 150;
const ZOOMS = [0.5, 0.75, 1, 1.5, 2, 3];

/** A page. One that comes into view while the document is `passing` is drawn when that has come to rest. */
function Sheet(given: { pdf: Pdf; n: number; top: number; width: number; passing: boolean }) {
  const { pdf, n, top, width, passing } = given;
  const host = useRef<HTMLDivElement>(null);
  const [problem, setProblem] = useState('');
  const [seen, setSeen] = useState(!passing);
  useEffect(() => {
    if (!passing) setSeen(true);
  }, [passing]);
  useEffect(() => {
    if (!seen) return;
    const controller = new AbortController();
    setProblem('');
    if (host.current)
      pdf.draw(n, host.current, controller.signal).catch((error) => {
        if (!controller.signal.aborted) setProblem(error.message);
      });
    return () => controller.abort();
  }, [pdf, n, width, seen]);
  return (
    <div
      class="pdf-page"
      role="group"
      aria-label={`Page ${n}`}
      style={{ top: `${top}px`, width: `${width}px`, height: `${width * pdf.ratio}px` }}
    >
      <div ref={host} />
      {problem && <p class="problem-text">{problem}</p>}
    </div>
  );
}

export function PdfDocument({ source, label }: { source: Source; label: string }) {
  const box = useRef<HTMLDivElement>(null);
  const pdf = useSignal<Pdf | null>(null);
  const error = useSignal<Error | undefined>(undefined);
  const zoom = useSignal(1);
  const [view, setView] = useState({ top: 0, height: 0, width: 0 });
  const [passing, setPassing] = useState(false);
  const quiet = useRef(0);
  /** How many pages are above what is seen; it stays where the pages change their size. */
  const above = useRef(0);
  const measure = () => {
    const element = box.current;
    if (element) setView({ top: element.scrollTop, height: element.clientHeight, width: element.clientWidth });
  };

  useEffect(() => {
    const controller = new AbortController();
    const failed = (problem: Error) => {
      if (!controller.signal.aborted) error.value = problem;
    };
    pdf.value = null;
    error.value = undefined;
    import('./pdf.ts')
      .then(({ Pdf }) => Pdf.open(source, controller.signal, failed))
      .then((opened) => {
        if (!controller.signal.aborted) pdf.value = opened;
      })
      .catch(failed);
    return () => controller.abort();
  }, [source.path, source.etag]);
  useEffect(() => () => clearTimeout(quiet.current), []);
  useLayoutEffect(() => {
    measure();
    const observer = new ResizeObserver(measure);
    if (box.current) observer.observe(box.current);
    return () => observer.disconnect();
  }, []);

  const shown = Math.min(PAGES, pdf.value?.count ?? 0);
  const width = Math.max(80, Math.round((view.width - 2 * GAP) * zoom.value));
  const step = Math.round(width * (pdf.value?.ratio ?? 1)) + GAP;
  const first = Math.max(0, Math.floor(view.top / step));
  const last = Math.min(shown, Math.ceil((view.top + view.height) / step));
  const current = Math.min(shown, Math.floor((view.top + view.height / 3) / step) + 1);
  useLayoutEffect(() => {
    if (box.current) box.current.scrollTop = above.current * step;
    measure();
  }, [step]);
  const go = (page: number) => box.current?.scrollTo({ top: (Math.min(shown, Math.max(1, page)) - 1) * step });
  const resize = (by: number) => {
    zoom.value = ZOOMS[ZOOMS.indexOf(zoom.value) + by] ?? zoom.value;
  };

  return (
    <>
      {pdf.value && (
        <div class="pane-note pdf-bar">
          <label>
            Page{' '}
            <input
              type="number"
              min={1}
              max={shown}
              value={current}
              onChange={(event) => go(Number(event.currentTarget.value) || 1)}
            />
          </label>
          <span class="soft">
            of {pdf.value.count.toLocaleString('en')}
            {pdf.value.count > shown && `; the first ${shown.toLocaleString('en')} are shown`}, {bytes(source.size)}
          </span>
          <span class="push" />
          <Button kind="quiet" aria-label="Smaller" disabled={zoom.value === ZOOMS[0]} onClick={() => resize(-1)}>
            −
          </Button>
          <Button kind="quiet" aria-label="Larger" disabled={zoom.value === ZOOMS.at(-1)} onClick={() => resize(1)}>
            +
          </Button>
        </div>
      )}
      <Problem error={error.value} />
      {!pdf.value && !error.value && <Waiting />}
      <div
        class="pdf"
        ref={box}
        // biome-ignore lint/a11y/noNoninteractiveTabindex: a region that scrolls must be reached by the keyboard
        tabIndex={0}
        role="region"
        aria-label={label}
        onScroll={(event) => {
          above.current = event.currentTarget.scrollTop / step;
          measure();
          setPassing(true);
          clearTimeout(quiet.current);
          quiet.current = window.setTimeout(() => setPassing(false), QUIET_MS);
        }}
      >
        <div style={{ height: `${shown * step + GAP}px`, width: `${width + 2 * GAP}px` }}>
          {pdf.value &&
            Array.from({ length: Math.max(0, last - first) }, (_, index) => {
              const n = first + index + 1;
              const top = (n - 1) * step + GAP;
              return pdf.value && <Sheet key={n} pdf={pdf.value} n={n} top={top} width={width} passing={passing} />;
            })}
        </div>
      </div>
    </>
  );
}
