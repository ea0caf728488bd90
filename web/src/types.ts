/** What the API answers, as the server describes it: names for the types that `make types` generates. */

import type { components } from '../../clients/typescript/src/generated/openapi.ts';

type Answers = components['schemas'];
/** An answer of which the dashboard knows more than its description says. */
type Known<Answer, More> = Omit<Answer, keyof More> & More;

export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
export type JsonObject = { [key: string]: Json };

export type Limits = Answers['LimitsAnswer'];
export type SetupResult = Answers['SetupResult'];
export type Session = Known<
  Answers['SessionAnswer'],
  { data: JsonObject; metadata: JsonObject; setup: JsonObject | null }
>;
export type RunEnd = Known<Answers['DoneEvent'], { data?: JsonObject; results?: CellResult[] }>;
export type Destination = Answers['DestinationAnswer'];
export type RunRecord = Known<Answers['RunRecordAnswer'], { enforced: JsonObject }>;
export type Artifact = Answers['ArtifactAnswer'];
export type FileEntry = Answers['ListedFile'];
export type Version = Known<Answers['VersionAnswer'], { data: JsonObject }>;
export type DataChange = Known<Answers['DataChangeAnswer'], { old?: Json; new?: Json }>;
export type ChangedFile = Answers['ChangedFileAnswer'];
export type Diff = Known<Answers['DiffAnswer'], { data: DataChange[] }>;
export type Delivery = Answers['DeliveryAnswer'];
export type DeliveryContent = Known<Answers['DeliveryContentAnswer'], { headers: [name: string, value: string][] }>;
export type Inbox = Answers['InboxAnswer'];
export type Language = Answers['LanguageAnswer'];
export type Health = Known<
  Answers['HealthAnswer'],
  { isolation: JsonObject & { driver: string; summary: string; missing?: { [name: string]: string } } }
>;
export type AuditEntry = Answers['AuditEntryAnswer'];
export type ApiKey = Answers['ApiKeyAnswer'] & { key?: string };
export type Webhook = Answers['WebhookAnswer'] & { secret?: string };
export type Notice = Answers['NoticeAnswer'];
export type Quotas = { [name in keyof Answers['OwnerQuotas']]-?: number };
/** Of `quotas`, which are in force, 0 is no limit; `set` are those that were set for this owner. */
export type Owner = { owner: string; quotas: Quotas; set: Partial<Quotas>; used: Quotas };
export type UsageDay = Answers['DayAnswer'];
export type Resource = Answers['ResourceAnswer'] & { size?: number; metadata?: JsonObject; updated_at?: string };
export type Installed = Answers['EnvironmentAnswer'];
export type Process = Answers['ProcessAnswer'];
export type Context = Answers['ContextAnswer'];
export type CellResult = Known<Answers['ResultAnswer'], { data: { [type: string]: Json } }>;
export type Finding = Answers['FindingAnswer'];
export type SettingInForce = Answers['LimitAnswer'];
export type Hosts = Answers['HostsAnswer'];
export type ServerFacts = Known<Answers['ServerAnswer'], { at_a_time: { runs: number; sandboxes: number } }>;

/** A page of a list. */
export interface Page {
  count: number;
  next_cursor: string | null;
}
