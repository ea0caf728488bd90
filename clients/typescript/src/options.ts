/** Options of a call that also has fields. */

import type { OnceOptions } from "./http.js";

/** Options apart from the fields of the body. */
export function split<T extends OnceOptions>(options: T): [body: Omit<T, keyof OnceOptions>, call: OnceOptions] {
  const { signal, requestTimeout, idempotencyKey, ...body } = options;
  return [body, { signal, requestTimeout, idempotencyKey }];
}
