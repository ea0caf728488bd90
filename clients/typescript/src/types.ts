/** The bodies and answers of the API by name. They are the server's own description of them, read off the paths. */

import type { paths } from "./generated/openapi.js";

type Method = "get" | "put" | "post" | "delete" | "patch";
type Content<T> = T extends { content: { "application/json": infer Body } } ? Body : never;

/** What a call answers with a 200, 201 or 202 in JSON. */
export type Answer<Path extends keyof paths, M extends Method, Status extends 200 | 201 | 202 = 200> =
  paths[Path][M] extends { responses: infer Responses } ? Status extends keyof Responses ? Content<Responses[Status]>
    : never
    : never;

/** The JSON body that a call takes. */
export type Body<Path extends keyof paths, M extends Method> = paths[Path][M] extends { requestBody?: infer Sent }
  ? Content<NonNullable<Sent>>
  : never;

export type Json = string | number | boolean | null | Json[] | { [name: string]: Json };
/** What a session's `data` holds: any JSON, named. */
export type Data = { [name: string]: unknown };

export type SessionInfo = Answer<"/api/sessions/{session_id}", "get">;
/** Whole sessions: the client asks for no fewer `fields`. */
export type SessionList = Omit<Answer<"/api/sessions", "get">, "sessions"> & { sessions: SessionInfo[] };
export type NewSession = Body<"/api/sessions", "post">;
export type SessionChanges = Body<"/api/sessions/{session_id}", "patch">;
export type DeletedSessions = Answer<"/api/sessions", "delete">;
export type DeletedSession = Answer<"/api/sessions/{session_id}", "delete">;
export type Copy = Body<"/api/sessions/{session_id}/duplicate", "post">;

export type RunBody = Body<"/api/sessions/{session_id}/run", "post">;
export type RunResult = Answer<"/api/sessions/{session_id}/run", "post"> & { data: Data };
export type RunRecord = Answer<"/api/sessions/{session_id}/runs/{run_id}", "get">;
export type ExecuteBody = Body<"/api/execute", "post">;
export type ExecuteResult = Answer<"/api/execute", "post">;

export type RunList = Answer<"/api/runs", "get">;
export type ContextInfo = Answer<"/api/sessions/{session_id}/contexts", "get">["contexts"][number];
export type Checkpoint = Answer<"/api/sessions/{session_id}/checkpoint", "post">;
export type Ticket = Answer<"/api/sessions/{session_id}/tickets", "post", 201>;

export type ProcessInfo = Answer<"/api/sessions/{session_id}/processes/{process}", "get">;
export type ProcessBody = Body<"/api/sessions/{session_id}/processes", "post">;

export type FileList = Answer<"/api/sessions/{session_id}/files", "get">;
export type FileInfo = FileList["files"][number];
export type FileWritten = Answer<"/api/sessions/{session_id}/files/{path}", "put">;
export type Unpacked = Answer<"/api/sessions/{session_id}/archive", "put">;
export type PathInfo = Answer<"/api/sessions/{session_id}/stat/{path}", "get">;
export type Moved = Answer<"/api/sessions/{session_id}/move", "post">;
export type Link = Answer<"/api/sessions/{session_id}/links", "post", 201>;
export type LinkBody = Body<"/api/sessions/{session_id}/links", "post">;
export type ArchiveFormat = "tar" | "tar.gz" | "zip";

export type VersionList = Answer<"/api/sessions/{session_id}/versions", "get">;
export type VersionHeader = VersionList["versions"][number];
export type Version = Answer<"/api/sessions/{session_id}/versions/{number}", "get">;
export type VersionDiff = Answer<"/api/sessions/{session_id}/versions/{number}/diff", "get">;

export type StoredCode = Answer<"/api/sessions/{session_id}/code", "get">;
export type CodeStored = Answer<"/api/sessions/{session_id}/code", "put">;
export type Setup = NonNullable<NewSession["setup"]>;
export type SetupResult = NonNullable<SessionInfo["setup_result"]>;
export type Packages = Answer<"/api/sessions/{session_id}/environment", "get">;
export type PublicUrl = Answer<"/api/sessions/{session_id}/host", "get">;

export type InboxSettings = Body<"/api/sessions/{session_id}/inbox", "put">;
export type InboxInfo = Answer<"/api/sessions/{session_id}/inbox", "get">;
export type DeliveryList = Answer<"/api/sessions/{session_id}/inbox/deliveries", "get">;
export type Delivery = DeliveryList["deliveries"][number];
export type DeliveryContent = Answer<"/api/sessions/{session_id}/inbox/deliveries/{delivery_id}", "get">;

export type StoredValue = Answer<"/api/storage/kv/{namespace}/{key}", "get">;
export type ValueList = Answer<"/api/storage/kv/{namespace}", "get">;
export type ObjectList = Answer<"/api/storage/r2/{namespace}", "get">;
export type SqlResult = Answer<"/api/storage/d1/{namespace}/query", "post">;
export type SqlParams = Body<"/api/storage/d1/{namespace}/query", "post">["params"];
export type ResourceList = Answer<"/api/resources/list", "get">;
export type ResourceStats = Answer<"/api/resources/stats", "get">;

export type KeyInfo = Answer<"/api/keys", "get">["keys"][number];
export type NewKey = Answer<"/api/keys", "post", 201>;
export type KeyOptions = Partial<Omit<Body<"/api/keys", "post">, "owner" | "description">>;
export type KeyChange = Body<"/api/keys/{key_id}", "patch">;
export type OwnerInfo = Answer<"/api/owners/{owner}", "get">;
export type Quotas = Body<"/api/owners/{owner}", "patch">["quotas"];
export type OwnQuotas = Answer<"/api/quotas", "get">;
export type DayOfUsage = Answer<"/api/usage", "get">["usage"][number];
export type WebhookOptions = Partial<Omit<Body<"/api/webhooks", "post">, "url">>;
export type WebhookInfo = Answer<"/api/webhooks", "get">["webhooks"][number];
export type NewWebhook = Answer<"/api/webhooks", "post", 201>;
export type WebhookDelivery = Answer<"/api/webhooks/{webhook_id}/deliveries", "get">["deliveries"][number];
export type AuditList = Answer<"/api/audit", "get">;
export type AuditEntry = AuditList["entries"][number];
export type ServerFacts = Answer<"/api/server", "get">;
export type ClusterHost = Answer<"/api/hosts", "get">["hosts"][number];
export type LanguageInfo = Answer<"/api/languages", "get">["languages"][number];
