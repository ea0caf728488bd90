/**
 * The client of an ERA server: sessions that remember, in which untrusted code runs.
 *
 *     const era = new Era({ url: "http://127.0.0.1:8787" });
 *     await using session = await era.session("python");
 *     console.log((await session.run("print(6 * 7)")).stdout);
 */

export { type AuditFilter, Era, type ExecuteOptions, type RunFilter } from "./era.js";
export * from "./errors.js";
export * from "./generated/errors.js";
export type { CellOptions, Context } from "./contexts.js";
export type { FileChange, FileEvent, Files, FileTree, LinkOptions, WriteOptions } from "./files.js";
export type { CallOptions, EraOptions, OnceOptions, Sent } from "./http.js";
export type { DeliveryFilter, Inbox } from "./inbox.js";
export type { Keys, Owners } from "./keys.js";
export type {
  CellEvent,
  Done,
  ExecuteDone,
  ExecuteEvent,
  ExecuteStream,
  Output,
  Run,
  RunEvent,
  RunOptions,
  Runs,
  RunStream,
  Shown,
} from "./runs.js";
export { bytesOf, type ProcessOutput } from "./process_output.js";
export type { Process, Processes, ProcessEvent, ProcessExit, ProcessOptions } from "./processes.js";
export type { SessionData } from "./data.js";
export type { Session } from "./session.js";
export type { SessionFilter, SessionOptions, Sessions } from "./sessions.js";
export type { SessionSetup, SetupEvent } from "./setup.js";
export type { Database, KeyValues, ListFilter, Objects, ResourceFilter, Storage, StoredObject } from "./storage.js";
export type { Gap } from "./streams.js";
export type { Terminal, TerminalExit, TerminalOptions, TerminalSize } from "./terminal.js";
export type * from "./types.js";
export type { Versions } from "./versions.js";
export type { Webhooks } from "./webhooks.js";
