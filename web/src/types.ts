/** What the API answers, as far as the dashboard reads it. */

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
export type JsonObject = { [key: string]: Json };

export interface Limits {
  memory_mb: number;
  cpus: number;
  pids: number;
  disk_mb: number;
  files: number;
  output_bytes: number;
}

export interface SetupResult {
  success: boolean;
  duration_ms: number;
  pip_packages: string[];
  npm_packages: string[];
  go_modules: string[];
  commands_run: string[];
  error: string | null;
  stdout: string;
  stderr: string;
}

export interface Session {
  id: string;
  created_at: string;
  last_run_at: string;
  language: string;
  persistent: boolean;
  file_count: number;
  total_size_bytes: number;
  metadata: JsonObject;
  data: JsonObject;
  setup: JsonObject | null;
  setup_status?: 'pending' | 'running' | 'completed' | 'failed';
  setup_result?: SetupResult | null;
  allowInternetAccess: boolean;
  allowPublicAccess: boolean;
  default_timeout: number;
  version: number;
  ttl: number | null;
  expires_at: string | null;
  limits: Limits;
  isolation: string;
  egress: { allow: string[] };
  service: string | string[] | null;
  storage: boolean;
  status: string;
}

export interface Page {
  count: number;
  next_cursor: string | null;
}

export interface Artifact {
  type: string;
  path: string;
  size: number;
}

export interface State {
  version: number | null;
  committed: boolean;
  reason: string | null;
  versions_dropped?: number;
}

export interface RunEnd {
  exit_code: number;
  duration: string;
  status: string;
  run_id: string;
  data?: JsonObject;
  stdout_truncated: boolean;
  stderr_truncated: boolean;
  state: State;
  artifacts: Artifact[];
  artifacts_more: number;
  setup_error?: string;
}

export interface Destination {
  host: string;
  port: number;
  address: string | null;
  allowed: boolean;
  reason: string | null;
  connections: number;
  sent: number;
  received: number;
  secrets: string[];
}

export interface RunRecord {
  run_id: string;
  session_id: string;
  status: string;
  started_at: string;
  ended_at: string;
  duration: string | null;
  exit_code: number | null;
  stdout_bytes: number;
  stderr_bytes: number;
  stdout_truncated: boolean;
  stderr_truncated: boolean;
  state: State;
  peak_memory_bytes: number | null;
  cpu_seconds: number | null;
  reaped: number | null;
  enforced: JsonObject;
  egress: { destinations: Destination[]; more: number };
  artifacts: Artifact[];
  artifacts_more: number;
}

export interface FileEntry {
  path: string;
  size: number;
  modified_at: string;
  uploaded: boolean;
  etag: string | null;
  type?: string;
  mode?: string | number;
  link?: string | null;
}

export interface Version {
  version: number;
  name: string | null;
  created_at: string;
  cause: string;
  run_id: string | null;
  file_count: number;
  total_size_bytes: number;
}

export interface DataChange {
  path: string;
  op: 'add' | 'replace' | 'remove';
  old?: Json;
  new?: Json;
}

export interface ChangedFile {
  path: string;
  size?: number;
  old_size?: number;
}

export interface Diff {
  version: number;
  data: DataChange[];
  files: { added: ChangedFile[]; changed: ChangedFile[]; removed: ChangedFile[] };
}

export interface Delivery {
  id: string;
  sender_id: string | null;
  received_at: string;
  status: string;
  attempts: number;
  run_ids: string[];
  next_attempt_at: string | null;
  ended_at: string | null;
  answer_status: number | null;
  reason: string | null;
  method: string;
  path: string;
  size: number;
}

export interface DeliveryContent extends Delivery {
  query: string;
  headers: [string, string][];
  body: string;
  body_encoding: string;
}

export interface Inbox {
  session_id: string;
  url: string;
  verify: { scheme: string; header: string } | null;
  retries: number;
  deliveries: { pending: number; running: number; done: number; failed: number };
}

export interface Language {
  name: string;
  title: string;
  aliases: string[];
  version: string | null;
  available: boolean;
  endings: string[];
  packages: string | null;
  reason?: string | null;
  hint?: string | null;
}

export interface Health {
  status: string;
  version: string;
  languages: string[];
  isolation: JsonObject & { driver: string; summary: string; missing?: { [name: string]: string } };
  sandboxes: { [use: string]: number };
}

export interface AuditEntry {
  id: string;
  at: string;
  owner: string;
  key: string | null;
  action: string;
  target: string | null;
  request_id: string;
  details: { [name: string]: unknown };
}

export interface ApiKey {
  id: string;
  owner: string;
  description: string;
  created_at: string;
  scopes: string[];
  expires_at: string | null;
  old_secret_until: string | null;
  key?: string;
}

export interface Webhook {
  id: string;
  url: string;
  events: string[];
  description: string;
  created_at: string;
  pending: number;
  done: number;
  failed: number;
  dropped: number;
  secret?: string;
}

/** What waits to be told to a webhook, was told or was given up. */
export interface Notice {
  id: string;
  event: string;
  status: string;
  tries: number;
  created_at: string;
  next_attempt_at: string | null;
  ended_at: string | null;
  http_status: number | null;
  reason: string | null;
}

export interface Quotas {
  sessions: number;
  sandboxes: number;
  memory_mb: number;
  disk_mb: number;
  storage_mb: number;
  runs_per_minute: number;
  cpu_seconds_per_day: number;
  egress_mb_per_day: number;
}

export interface Owner {
  owner: string;
  /** In force; 0 is no bound. */
  quotas: Quotas;
  /** Those that were set for this owner. */
  set: Partial<Quotas>;
  used: Quotas;
}

export interface UsageDay {
  owner: string;
  day: string;
  runs: number;
  cpu_seconds: number;
  egress_bytes: number;
  storage_bytes: number | null;
  disk_bytes: number | null;
}

export interface Resource {
  type: 'kv' | 'd1' | 'r2';
  namespace: string;
  key: string;
  size?: number;
  metadata?: JsonObject;
  created_at?: string;
  updated_at?: string;
}

export interface Installed {
  environment: string | null;
  setup_status?: string;
  pip: { name: string; version: string }[];
  npm: { name: string; version: string; integrity?: string }[];
  go: { name: string; version: string; integrity?: string }[];
}

export interface Process {
  process_id: string;
  tag: string | null;
  command: string | string[];
  status: string;
  pid: number | null;
  stdin: boolean;
  pty: boolean;
  started_at: string;
  ended_at: string | null;
  exit_code: number | null;
  signal: string | null;
  reason: string | null;
  output_bytes: number | null;
}

export interface Context {
  name: string;
  language: string;
  kernel: string;
  status: 'busy' | 'idle';
  execution_count: number;
  memory_bytes: number | null;
  started_at: string;
}

export interface CellResult {
  data: { [type: string]: string };
  metadata: JsonObject;
  main: boolean;
}

/** What a run in a context adds to the answer of a run. */
export interface CellEnd extends RunEnd {
  context?: string;
  results?: CellResult[];
  results_truncated?: boolean;
  error?: { name: string; value: string; traceback: string } | null;
  execution_count?: number | null;
  memory?: { kept: boolean; reason: string | null };
}

export interface SettingInForce {
  name: string;
  value: number | null;
  default: number | null;
  description: string;
}

export interface Finding {
  about: string;
  there: boolean;
  text: string;
  remedy: string | null;
}

export interface ServerFacts {
  version: string;
  at_a_time: { runs: number; sandboxes: number };
  limits: SettingInForce[];
  findings: Finding[];
}
