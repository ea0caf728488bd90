/** An element whose text is a style sheet, which it adopts as long as it is in the page. See inertStyles in build.mjs. */

class SheetElement extends HTMLElement {
  private readonly sheet = new CSSStyleSheet();

  override set textContent(css: string) {
    this.sheet.replaceSync(css);
  }

  override get textContent(): string {
    return '';
  }

  connectedCallback(): void {
    this.hidden = true;
    document.adoptedStyleSheets.push(this.sheet);
  }

  disconnectedCallback(): void {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((sheet) => sheet !== this.sheet);
  }
}

if (!customElements.get('era-sheet')) customElements.define('era-sheet', SheetElement);
