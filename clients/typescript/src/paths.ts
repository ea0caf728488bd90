/** Paths and queries of the API's URLs. */

import { type EraError, type ErrorFields, NotFound } from "./errors.js";
import { BadKey, BadNamespace, BadPath, BY_CODE, InvalidField } from "./generated/errors.js";

export type Query = Record<string, string | number | boolean | null | undefined>;

/** The path of a session's calls. */
export function sessionPath(id: string): string {
  return `/api/sessions/${named(id, NotFound, "A session's id")}`;
}

/** The path of a file of a session or version, which is `root`: of its content, or of what there is to say about it. */
export function filePath(root: string, path: string, what: "files" | "stat" = "files"): string {
  const isRoot = what === "stat" && (path === "" || path === ".");
  return `${root}/${what}/${isRoot ? "" : below(path, BadPath, "A file's path")}`;
}

/** The path of a storage's namespace. */
export function namespacePath(kind: "kv" | "d1" | "r2", namespace: string): string {
  return `/api/storage/${kind}/${named(namespace, BadNamespace, "A namespace")}`;
}

/** The path of a key in a namespace, whose slashes stay. */
export function keyPath(namespace: string, key: string): string {
  return `${namespace}/${below(key, BadKey, "A key")}`;
}

/** The id of something as a part of a path. */
export function part(id: string): string {
  return named(id, InvalidField, "An id");
}

type Refusal = new (message: string, fields: ErrorFields) => EraError;

function below(path: string, Kind: Refusal, what: string): string {
  return path.split("/").map((name) => named(name, Kind, what)).join("/");
}

/**
 * One name in a path. URLs give `.` and `..` a meaning, also where they are escaped: a session of the id `..` would be
 * all sessions. So these can't be sent, and neither can an empty name.
 */
function named(name: string, Kind: Refusal, what: string): string {
  if (name === "" || name === "." || name === "..") {
    const code = Object.keys(BY_CODE).find((code) => BY_CODE[code] === Kind) ?? "bad_request";
    const hint = "URLs give names of dots, and empty ones, another meaning. Choose another name.";
    throw new Kind(`${what} can't have the part '${name}'.`, { status: Kind === NotFound ? 404 : 400, code, hint });
  }
  return encodeURIComponent(name);
}

/** `path` with its query; what is undefined or null is left out. */
export function withQuery(path: string, query: Query = {}): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null) search.append(name, String(value));
  }
  const text = search.toString();
  return text ? `${path}?${text}` : path;
}
