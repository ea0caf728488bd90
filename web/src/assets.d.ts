/** Files that the build puts beside the dashboard; importing one gives its path. */
declare module '*.worker.min.mjs' {
  const path: string;
  export default path;
}
