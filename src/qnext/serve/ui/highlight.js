// Colours for code: one small scanner, told the words and comments of a language. It colours what
// it is sure of and leaves the rest plain.

import { h } from "./dom.js";

const words = (text) => new Set(text.split(" "));

const C_LIKE = "break case catch class const continue default do else enum extends finally for if " +
  "import in instanceof interface new null private protected public return static super switch " +
  "this throw try void while true false";

const PYTHON = {
  words: words("False None True and as assert async await break case class continue def del elif " +
    "else except finally for from global if import in is lambda match nonlocal not or pass raise " +
    "return try while with yield self"),
  comment: /#.*/y,
  string: /[rbfuRBFU]{0,2}(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?)/y,
};
const SCRIPT = {
  words: words(`${C_LIKE} async await delete export from function get let of set typeof ` +
    "undefined var yield type readonly as"),
  comment: /\/\/.*|\/\*[\s\S]*?(?:\*\/|$)/y,
  string: /"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|`(?:[^`\\]|\\[\s\S])*`?/y,
};
const C = {
  words: words(`${C_LIKE} auto bool char constexpr delete double explicit extern float fn func go ` +
    "impl inline int let long match mod mut namespace nullptr operator package pub short signed " +
    "sizeof struct template trait typedef typename union unsigned use using virtual where string " +
    "var defer chan map range select type i32 i64 u8 u32 u64 f32 f64 usize Self self"),
  comment: /\/\/.*|\/\*[\s\S]*?(?:\*\/|$)/y,
  string: /"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.){1,4}'/y,
};
const SHELL = {
  words: words("if then else elif fi for while until do done case esac in function return export " +
    "local set source exit echo cd"),
  comment: /(?<=^|\s)#.*/y,
  string: /"(?:[^"\\]|\\.)*"?|'[^']*'?/y,
};
const SQL = {
  words: words("select from where and or not null is in as on join left right inner outer group by " +
    "order having limit insert into values update set delete create table primary key distinct " +
    "union all case when then else end"),
  ignoreCase: true,
  comment: /--.*|\/\*[\s\S]*?(?:\*\/|$)/y,
  string: /'(?:[^']|'')*'?/y,
};
const JSON_LIKE = { words: words("true false null yes no"), comment: /(?<=^|\s)#.*/y,
  string: /"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?/y };

const LANGUAGES = {
  python: PYTHON, py: PYTHON,
  javascript: SCRIPT, js: SCRIPT, jsx: SCRIPT, typescript: SCRIPT, ts: SCRIPT, tsx: SCRIPT,
  c: C, cpp: C, "c++": C, cc: C, h: C, rust: C, rs: C, go: C, java: C, kotlin: C, swift: C,
  csharp: C, cs: C, cuda: C,
  sh: SHELL, bash: SHELL, shell: SHELL, zsh: SHELL, console: SHELL,
  sql: SQL, json: JSON_LIKE, yaml: JSON_LIKE, yml: JSON_LIKE, toml: JSON_LIKE,
};

const NUMBER = /\b(?:0x[\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?)\b/y;
const WORD = /[A-Za-z_]\w*/y;
const OTHER = /[^A-Za-z_\d"'`#/-]+|[\s\S]/y;
/** Longer code stays plain: colouring it at every piece of a stream would be slow. */
const MOST = 40_000;

/** The code as nodes: text, and spans for what has a colour. */
export function highlight(code, name) {
  const language = LANGUAGES[name.toLowerCase()];
  if (!language || code.length > MOST) return [code];
  const nodes = [];
  let plain = "";
  const put = (kind, text) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(h("span", { class: kind }, text));
  };
  for (let at = 0; at < code.length; ) {
    const taken = (pattern) => {
      pattern.lastIndex = at;
      return pattern.exec(code)?.[0] || null;
    };
    let text;
    if ((text = taken(language.comment))) put("c-comment", text);
    else if ((text = taken(language.string))) put("c-string", text);
    else if ((text = taken(NUMBER))) put("c-number", text);
    else if ((text = taken(WORD))) {
      const word = language.ignoreCase ? text.toLowerCase() : text;
      if (language.words.has(word)) put("c-word", text);
      else if (code[at + text.length] === "(") put("c-call", text);
      else plain += text;
    } else plain += text = taken(OTHER);
    at += text.length;
  }
  if (plain) nodes.push(plain);
  return nodes;
}
