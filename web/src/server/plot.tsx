/** A small plot over time; its code is loaded when the first one is shown. */

import { useEffect, useRef } from 'preact/hooks';
import type uPlot from 'uplot';
import { theme } from '../ui/theme.ts';

interface Props {
  title: string;
  unit?: string;
  /** How times are written, in uPlot's own letters. */
  clock?: string;
  times: number[];
  series: { label: string; values: (number | null)[]; color: string }[];
}

const HEIGHT = 130;
/** Between marks of the vertical axis; what is counted has no halves. */
const STEPS = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));

export function Plot({ title, times, series, unit = '', clock = '{HH}:{mm}:{ss}' }: Props) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const data = [times, ...series.map((each) => each.values)] as uPlot.AlignedData;
  const latest = useRef(data);
  latest.current = data;
  const colors = theme.value;

  useEffect(() => {
    let gone = false;
    let observer: ResizeObserver | undefined;
    void import('uplot').then(({ default: Plotter }) => {
      const element = host.current;
      if (gone || !element) return;
      const style = getComputedStyle(document.documentElement);
      const color = (name: string) => style.getPropertyValue(name).trim();
      const axis = {
        stroke: color('--soft'),
        grid: { stroke: color('--line'), width: 1 },
        ticks: { show: false },
        font: '11px system-ui, sans-serif',
      };
      plot.current = new Plotter(
        {
          width: element.clientWidth,
          height: HEIGHT,
          cursor: { show: false },
          legend: { show: false },
          padding: [8, 22, 0, 0],
          axes: [
            {
              ...axis,
              grid: { show: false },
              size: 24,
              values: [[1, clock, null, null, null, null, null, null, 1]],
            },
            { ...axis, size: 36, space: 28, incrs: STEPS },
          ],
          scales: {
            // Of one time alone the library would show a whole day.
            x: {
              range: (self, low, high) => (self.data[0].length > 1 ? [low, high] : [(low ?? 0) - 30, (low ?? 0) + 30]),
            },
            y: { range: (_, low, high) => [Math.min(0, low ?? 0), Math.max(1, (high ?? 1) * 1.1)] },
          },
          series: [
            {},
            ...series.map((each) => ({
              label: each.label,
              stroke: color(each.color),
              width: 2,
              // One value alone makes no line.
              points: { show: (self: uPlot) => self.data[0].length < 2 },
            })),
          ],
        },
        latest.current,
        element,
      );
      observer = new ResizeObserver(() => plot.current?.setSize({ width: element.clientWidth, height: HEIGHT }));
      observer.observe(element);
    });
    return () => {
      gone = true;
      observer?.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [colors, series.map((each) => each.label).join()]);
  useEffect(() => plot.current?.setData(data), [times.length, times.at(-1)]);

  return (
    <figure class="plot">
      <figcaption>
        {title}
        <span class="plot-legend">
          {series.map((each) => (
            <span key={each.label}>
              <i class="swatch" style={{ background: `var(${each.color})` }} />
              {each.label} <b>{each.values.at(-1)?.toLocaleString('en', { maximumFractionDigits: 1 }) ?? '–'}</b>
              {unit}
            </span>
          ))}
        </span>
      </figcaption>
      <div ref={host} class="plot-box" aria-hidden="true" />
    </figure>
  );
}
