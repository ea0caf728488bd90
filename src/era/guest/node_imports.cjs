'use strict';
// Turns the static `import` declarations of a cell into `await import()`: a REPL evaluates scripts, which have none.
const { Boolean, Math } = global; // cells may declare others: see node_kernel.cjs

// Whether code that ends like this goes on with a regular expression where a slash follows, and not with a division.
const BEFORE_REGEX = /(?:^|[([{,;:=!&|?+\-*%^~<>]|\b(?:return|typeof|case|in|of|delete|void|throw|new|do|else|await|yield))\s*$/;
// What a declaration is made of up to its source, and what may follow that. No two kinds begin alike, so that a search
// never has to go back.
const PART = /\s+|\/\/[^\n]*|\/\*[^]*?\*\/|[$\p{ID_Continue}]+|[{},*]|"[^"\n]*"|'[^'\n]*'/uy;
const END = /(?:\s*with\s*(\{[^}]*\}))?[ \t]*;?/y;
const isName = (part) => /^[$\p{ID_Continue}]/u.test(part);

// What `expression` matches right at `at`.
const matchAt = (expression, code, at) => {
  expression.lastIndex = at;
  return expression.exec(code);
};

// The import declaration that begins at `at`, if there is one: what it declares, from where, and where it ends.
const declarationAt = (code, at) => {
  const parts = [];
  let isWithinBraces = false;
  let place = at + 'import'.length;
  if (isName(code.slice(place, place + 2))) return undefined; // two units may be one character
  for (;;) {
    const match = matchAt(PART, code, place);
    if (!match) return undefined;
    const part = match[0];
    place += part.length;
    if (/^["']/.test(part) && (parts.length === 0 || parts.at(-1) === 'from')) {
      const [end, attributes] = matchAt(END, code, place);
      const clause = parts.length ? parts.slice(0, -1).join(' ') : undefined;
      return { clause, source: part, attributes, end: place + end.length };
    }
    if (part === '{' || part === '}') isWithinBraces = part === '{';
    if (part === 'import' && !isWithinBraces) return undefined; // the next one: each is looked at once
    if (!/^(?:\s|\/)/.test(part)) parts.push(part);
  }
};

// Where a string, a template, a comment or a regular expression that begins at `at` ends; `at` itself where none begins.
const endOfLiteral = (code, at) => {
  const [first, second] = [code[at], code[at + 1]];
  if (first === '/' && second === '/') {
    const end = code.indexOf('\n', at);
    return end < 0 ? code.length : end;
  }
  if (first === '/' && second === '*') {
    const end = code.indexOf('*/', at + 2);
    return end < 0 ? code.length : end + 2;
  }
  if (first === '/' && !BEFORE_REGEX.test(code.slice(Math.max(0, at - 40), at))) return at;
  if (!['"', "'", '`', '/'].includes(first)) return at;
  let inClass = false;
  for (let place = at + 1; place < code.length; place += 1) {
    const character = code[place];
    if (character === '\\') place += 1;
    else if (first === '/' && character === '[') inClass = true;
    else if (first === '/' && character === ']') inClass = false;
    else if (first === '`' && character === '$' && code[place + 1] === '{') place = endOfBraces(code, place + 1) - 1;
    else if (character === first && !inClass) return place + 1;
    else if (character === '\n' && first !== '`') return place;
  }
  return code.length;
};

const endOfBraces = (code, at) => {
  let depth = 0;
  for (let place = at; place < code.length; ) {
    const end = endOfLiteral(code, place);
    if (end > place) {
      place = end;
      continue;
    }
    if (code[place] === '{') depth += 1;
    if (code[place] === '}' && --depth === 0) return place + 1;
    place += 1;
  }
  return code.length;
};

// `* as all, one, { two as three }` as what declares the same names. One space is between each two parts.
const declared = ({ clause, source, attributes }) => {
  const call = `await import(${source}${attributes ? `, { with: ${attributes} }` : ''})`;
  if (clause === undefined) return `${call}; void 0;`;
  const braces = /\{([^}]*)\}/.exec(clause);
  const all = /\* as (\S+)/.exec(clause);
  const byDefault = /^[^\s{},*]+/.exec(clause);
  const names = braces ? braces[1].split(',').map((name) => name.trim()).filter(Boolean) : [];
  const fields = names.map((name) => name.replace(' as ', ': '));
  if (byDefault) fields.unshift(`default: ${byDefault[0]}`);
  if (all) return `var ${all[1]} = ${call};${fields.length ? ` var { ${fields.join(', ')} } = ${all[1]};` : ''}`;
  return `var { ${fields.join(', ')} } = ${call};`;
};

// The code without static imports. Names that are imported again are declared anew, so that a cell may be run twice.
const withoutImports = (code) => {
  if (!/\bimport\b/.test(code)) return code;
  let made = '';
  let startsStatement = true;
  for (let place = 0; place < code.length; ) {
    const end = endOfLiteral(code, place);
    if (end > place) {
      const isComment = code[place] === '/' && (code[place + 1] === '/' || code[place + 1] === '*');
      if (!isComment) startsStatement = false;
      made += code.slice(place, end);
      place = end;
      continue;
    }
    if (startsStatement && code.startsWith('import', place)) {
      const declaration = declarationAt(code, place);
      if (declaration) {
        made += declared(declaration);
        made += '\n'.repeat(code.slice(place, declaration.end).split('\n').length - 1);
        place = declaration.end;
        continue;
      }
    }
    if (code[place] === '{') {
      const close = endOfBraces(code, place);
      made += code.slice(place, close);
      place = close;
      startsStatement = true;
      continue;
    }
    if (code[place] === '\n' || code[place] === ';') startsStatement = true;
    else if (!/\s/.test(code[place])) startsStatement = false;
    made += code[place];
    place += 1;
  }
  return made;
};

module.exports = { withoutImports };
