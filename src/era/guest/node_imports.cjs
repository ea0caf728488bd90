'use strict';
// Turns the static `import` declarations of a cell into `await import()`: a REPL evaluates scripts, which have none.
const { Boolean, Math } = global; // cells may declare others: see node_kernel.cjs

// Whether code that ends like this goes on with a regular expression where a slash follows, and not with a division.
const BEFORE_REGEX = /(?:^|[([{,;:=!&|?+\-*%^~<>]|\b(?:return|typeof|case|in|of|delete|void|throw|new|do|else|await|yield))\s*$/;
const DECLARATION =
  /^import\s*(?:([\w$\s{},*]+?)\s*\bfrom\s*)?(['"])([^'"\n]+)\2(?:\s*with\s*(\{[^}]*\}))?[ \t]*;?/;

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

// `* as all, one, { two as three }` as what declares the same names.
const declared = (clause, source, attributes, number) => {
  const call = `await import(${source}${attributes ? `, { with: ${attributes} }` : ''})`;
  const braces = /\{([^}]*)\}/.exec(clause);
  const all = /\*\s*as\s+([\w$]+)/.exec(clause);
  const byDefault = /^\s*([\w$]+)/.exec(clause.replace(/\{[^}]*\}/, ''));
  const names = braces ? braces[1].split(',').map((name) => name.trim()).filter(Boolean) : [];
  const fields = names.map((name) => name.replace(/\s+as\s+/, ': '));
  if (byDefault && byDefault[1] !== 'as') fields.unshift(`default: ${byDefault[1]}`);
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
      const match = DECLARATION.exec(code.slice(place));
      if (match) {
        const source = `${match[2]}${match[3]}${match[2]}`;
        made += match[1] === undefined ? `await import(${source}); void 0;` : declared(match[1], source, match[4]);
        made += '\n'.repeat(match[0].split('\n').length - 1);
        place += match[0].length;
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
