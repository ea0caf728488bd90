// Sets the theme before the first paint. It is a classic script in the page, so that the page waits for it.
const kept = localStorage.getItem('era-theme');
const system = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
document.documentElement.dataset.theme = kept === 'light' || kept === 'dark' ? kept : system;

export {};
