/** A session's files. */

import type { CallOptions, Sent, Transport } from "./http.js";
import { NotFound } from "./errors.js";
import { split } from "./options.js";
import { collect, pages } from "./pages.js";
import { filePath } from "./paths.js";
import { follow, type Gap } from "./streams.js";
import type {
  Answer,
  ArchiveFormat,
  FileInfo,
  FileList,
  FileWritten,
  Link,
  LinkBody,
  Moved,
  PathInfo,
  Unpacked,
} from "./types.js";

/** What happened to a file. `overflow`: more than could be told. */
export type FileChange =
  | { type: "watching" | "create" | "write" | "remove" | "chmod"; path: string }
  | { type: "rename"; path: string; to: string }
  | { type: "overflow" };
export type FileEvent = FileChange | Gap;

export interface WriteOptions extends CallOptions {
  /** The ETag that the file must have now: it isn't overwritten if somebody else changed it. */
  ifMatch?: string;
  /** `*`: only where there is no such file yet. */
  ifNoneMatch?: string;
  /** Say at once, by an error, if a run has the session's turn. */
  wait?: false;
}

/** What a link is for (`method`), for how long (`expires_in`, in seconds), and how much may be put (`max_bytes`). */
export interface LinkOptions extends Partial<Omit<LinkBody, "path">>, CallOptions {}

/** Reads a tree of files: a session's own, or that of an old version. */
export class FileTree implements AsyncIterable<FileInfo> {
  protected readonly transport: Transport;
  protected readonly root: string;

  constructor(transport: Transport, root: string) {
    this.transport = transport;
    this.root = root;
  }

  /** A file's bytes. */
  async read(path: string, options: CallOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    return this.transport.bytes({ method: "GET", path: this.path(path) }, options);
  }

  /** A file as text, which must be UTF-8. */
  async text(path: string, options: CallOptions = {}): Promise<string> {
    return new TextDecoder("utf-8", { fatal: true }).decode(await this.read(path, options));
  }

  /** A file's answer, to read its body piece by piece: `(await files.open("big.bin")).body`. */
  async open(path: string, options: CallOptions = {}): Promise<Response> {
    return this.transport.open({ method: "GET", path: this.path(path) }, options);
  }

  /** Whether there is such a file. */
  async exists(path: string, options: CallOptions = {}): Promise<boolean> {
    try {
      await this.transport.bytes({ method: "HEAD", path: this.path(path) }, options);
      return true;
    } catch (error) {
      if (error instanceof NotFound) return false;
      throw error;
    }
  }

  /** All files in the order of their paths. */
  list(filter: { prefix?: string } = {}, options: CallOptions = {}): Promise<FileInfo[]> {
    return collect(this.iterate(filter, options));
  }

  [Symbol.asyncIterator](): AsyncGenerator<FileInfo, void, undefined> {
    return this.iterate();
  }

  /** The same, page by page, for trees that are large. `limit` is how many come in one answer. */
  iterate(
    filter: { prefix?: string; limit?: number } = {},
    options: CallOptions = {},
  ): AsyncGenerator<FileInfo, void, undefined> {
    const path = `${this.root}/files`;
    const get = (cursor?: string) =>
      this.transport.json<FileList>({ method: "GET", path, query: { ...filter, cursor } }, options);
    return pages(get, (page) => page.files);
  }

  /** The whole tree as one archive, whose body is read piece by piece. */
  async archive(format: ArchiveFormat = "tar", options: CallOptions = {}): Promise<Response> {
    return this.transport.open({ method: "GET", path: `${this.root}/archive`, query: { format } }, options);
  }

  protected path(path: string): string {
    return filePath(this.root, path);
  }
}

/** A session's files, to read and to change. */
export class Files extends FileTree {
  /**
   * What changes in a session's files from now on, without end. It begins with `watching`. Where the connection broke, or
   * the session has become live, there is another one, behind which comes what has changed meanwhile, or a `gap`. Leaving
   * the loop ends it. Throws NotLive when the session isn't live any more.
   */
  watch(
    options: { path?: string; recursive?: boolean } & CallOptions = {},
  ): AsyncGenerator<FileEvent, void, undefined> {
    const { path, recursive, ...call } = options;
    const from = (after?: number) =>
      ({ method: "GET", path: `${this.root}/watch`, query: { path, recursive, after }, endless: true }) as const;
    return follow<FileChange>(this.transport, { begin: from(), resume: (last) => from(last), last: "" }, call);
  }

  /** Write a file, in place of the one that is there. */
  async write(
    path: string,
    content: Sent,
    { ifMatch, ifNoneMatch, wait, ...options }: WriteOptions = {},
  ): Promise<FileWritten> {
    const headers: Record<string, string> = { "Content-Type": "application/octet-stream" };
    if (ifMatch !== undefined) headers["If-Match"] = ifMatch;
    if (ifNoneMatch !== undefined) headers["If-None-Match"] = ifNoneMatch;
    const isFree = ifMatch === undefined && ifNoneMatch === undefined; // the second time a condition may fail
    return this.transport.json(
      {
        method: "PUT",
        path: this.path(path),
        query: { wait },
        body: content,
        headers,
        repeatable: isFree,
        endless: true,
      },
      options,
    );
  }

  /** What is at a path: a file, a link or a directory. */
  async stat(path: string, options: CallOptions = {}): Promise<PathInfo> {
    return this.transport.json({ method: "GET", path: filePath(this.root, path, "stat") }, options);
  }

  /** Move a file, link or directory; with `replace` over a file or link that is there. */
  move(from: string, to: string, { replace, ...options }: { replace?: boolean } & CallOptions = {}): Promise<Moved> {
    const json = replace === undefined ? { from, to } : { from, to, replace };
    return this.transport.json({ method: "POST", path: `${this.root}/move`, json, endless: true }, options);
  }

  /** Make a directory, and those on the way to it. It may be there already. */
  async mkdir(path: string, { mode, ...options }: { mode?: string } & CallOptions = {}): Promise<void> {
    const json = mode === undefined ? { path } : { path, mode };
    const call = { method: "POST", path: `${this.root}/mkdir`, json, repeatable: true, endless: true } as const;
    await this.transport.json(call, options);
  }

  /** A URL by which one file can be read or written for a while, without a key. */
  link(path: string, options: LinkOptions = {}): Promise<Link> {
    const [fields, call] = split(options);
    const json = { path, ...fields };
    return this.transport.json({ method: "POST", path: `${this.root}/links`, json, repeatable: true }, call);
  }

  /** Remove a file or link, or with `recursive` a directory with all that is in it. */
  async remove(path: string, { recursive, ...options }: { recursive?: boolean } & CallOptions = {}): Promise<void> {
    type Deleted = Answer<"/api/sessions/{session_id}/files/{path}", "delete">;
    const call = { method: "DELETE", path: this.path(path), query: { recursive }, endless: true } as const;
    await this.transport.json<Deleted>(call, options);
  }

  /** Add what is in a tar, tar.gz or zip archive; with `replace` it takes the place of all files. All or nothing. */
  extract(archive: Sent, { replace, ...options }: { replace?: boolean } & CallOptions = {}): Promise<Unpacked> {
    return this.transport.json(
      {
        method: "PUT",
        path: `${this.root}/archive`,
        query: { replace },
        body: archive,
        headers: { "Content-Type": "application/octet-stream" },
        repeatable: true,
        endless: true,
      },
      options,
    );
  }
}
