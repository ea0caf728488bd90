// Sets the theme before the first paint. It is a classic script, so that the page waits for it.
const theme = localStorage.getItem('era-theme');
if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;

export {};
