/** Languages of this server, and a first program in each. */

import { signal } from '@preact/signals';
import { call } from './api.ts';
import type { Language } from './types.ts';

export const languages = signal<Language[]>([]);

export async function loadLanguages(): Promise<void> {
  languages.value = (await call<{ languages: Language[] }>('/api/languages')).languages;
}

export function titleOf(name: string): string {
  return languages.value.find((each) => each.name === name)?.title ?? name;
}

export const FIRST: { [language: string]: string } = {
  python: `import json

with open(".session_data.json") as file:
    data = json.load(file)
data["count"] = data.get("count", 0) + 1
with open(".session_data.json", "w") as file:
    json.dump(data, file)
print("Run number", data["count"])
`,
  node: `const fs = require('node:fs');

const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
data.count = (data.count ?? 0) + 1;
fs.writeFileSync('.session_data.json', JSON.stringify(data));
console.log('Run number', data.count);
`,
  typescript: `import fs from 'node:fs';

const data: { count?: number } = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
data.count = (data.count ?? 0) + 1;
fs.writeFileSync('.session_data.json', JSON.stringify(data));
console.log('Run number', data.count);
`,
  deno: `const data: { count?: number } = JSON.parse(Deno.readTextFileSync('.session_data.json'));
data.count = (data.count ?? 0) + 1;
Deno.writeTextFileSync('.session_data.json', JSON.stringify(data));
console.log('Run number', data.count);
`,
  go: `package main

import (
	"encoding/json"
	"fmt"
	"os"
)

func main() {
	text, _ := os.ReadFile(".session_data.json")
	data := map[string]any{}
	json.Unmarshal(text, &data)
	count, _ := data["count"].(float64)
	data["count"] = count + 1
	text, _ = json.Marshal(data)
	os.WriteFile(".session_data.json", text, 0o644)
	fmt.Println("Run number", count+1)
}
`,
  shell: `runs=$(($(cat runs 2>/dev/null || echo 0) + 1))
echo $runs > runs
echo "Run number $runs"
`,
};
