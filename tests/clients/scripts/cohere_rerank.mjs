// MODEL URL: documents in the order that Cohere's own client gets them.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { CohereClientV2 } = createRequire(process.env.PACKAGES + "/")("cohere-ai");
const [model, baseUrl] = process.argv.slice(2);
const client = new CohereClientV2({ token: "unused", baseUrl });
const documents = ["The quick brown fox", "A server answers requests", "fox"];
const answer = await client.rerank({ model, query: "the quick fox", documents, topN: 2 });
assert.equal(answer.results.length, 2);
const scores = answer.results.map((one) => one.relevanceScore);
assert.ok(scores[0] >= scores[1]);
assert.ok(answer.results.every((one) => one.index >= 0 && one.index < documents.length));
