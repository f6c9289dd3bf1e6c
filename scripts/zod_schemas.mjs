// Writes what zod makes of its usual constructions, as tests/chat/schema/zod.json:
//   npm install --no-save zod@4.6.7 && node scripts/zod_schemas.mjs > tests/chat/schema/zod.json
import { createRequire } from "node:module";
import { z } from "zod";

const Tree = z.object({ value: z.int(), get children() { return z.array(Tree).max(2); } });
const cases = {
  string: z.string(), length: z.string().min(2).max(5), email: z.email(), url: z.url(),
  uuid: z.uuid(), base64: z.base64(), base64url: z.base64url(), jwt: z.jwt(), cuid: z.cuid(),
  cuid2: z.cuid2(), nanoid: z.nanoid(), ulid: z.ulid(), ksuid: z.ksuid(), emoji: z.emoji(),
  startsWith: z.string().startsWith("a."), endsWith: z.string().endsWith("z"),
  includes: z.string().includes("a+b"), lowercase: z.string().lowercase(),
  regexLookahead: z.string().regex(/^\d{3}(?!0)/), datetime: z.iso.datetime(),
  date: z.iso.date(), time: z.iso.time(), duration: z.iso.duration(), hostname: z.hostname(),
  ipv4: z.ipv4(), ipv6: z.ipv6(), cidrv4: z.cidrv4(), e164: z.e164(), int32: z.int32(),
  step: z.number().multipleOf(0.1).min(0).max(9), literal: z.literal(["a", 1, null]),
  nullable: z.string().nullable(), optionalNever: z.object({ a: z.never().optional() }),
  record: z.record(z.string(), z.int()), enumRecord: z.partialRecord(z.enum(["a", "b"]), z.int()),
  tuple: z.tuple([z.string(), z.int()]).rest(z.boolean()),
  discriminated: z.discriminatedUnion("k", [
    z.object({ k: z.literal("a"), x: z.int() }), z.object({ k: z.literal("b") }),
  ]),
  tree: z.object({ root: Tree, rest: z.looseObject({ a: z.int() }).optional() }),
};
const { version } = createRequire(import.meta.url)("zod/package.json");
const schemas = Object.fromEntries(Object.entries(cases).map(([k, s]) => [k, z.toJSONSchema(s)]));
console.log(JSON.stringify({ zod: version, schemas }, null, 1));
