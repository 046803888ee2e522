// MODEL URL EMBEDDER PROMPT: all that Ollama's own client has for text, and an agent's loop.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.env.PACKAGES + "/");
const { Ollama } = await import(pathToFileURL(require.resolve("ollama")));

const [model, host, embedder, prompt] = process.argv.slice(2);
const client = new Ollama({ host });

const run = {
  read_file: ({ path }) => readFileSync(path, "utf8"),
  edit_file: (change) => {
    const text = readFileSync(change.path, "utf8");
    writeFileSync(change.path, text.replace(change.old, change.new));
    return "edited";
  },
  run_command: ({ command, output }) => {
    const said = execFileSync(command[0], command.slice(1), { encoding: "utf8" });
    writeFileSync(output, said);
    return said;
  },
};
const text = { type: "string" };
const described = (name, properties) => ({
  type: "function",
  function: {
    name,
    description: name,
    parameters: { type: "object", properties, required: Object.keys(properties) },
  },
});
const tools = [
  described("read_file", { path: text }),
  described("edit_file", { path: text, old: text, new: text }),
  described("run_command", { command: { type: "array", items: text }, output: text }),
];

const messages = [{ role: "user", content: prompt }];
for (let turn = 0; turn < 10; turn += 1) {
  const answer = { role: "assistant", content: "", tool_calls: [] };
  let last;
  for await (const part of await client.chat({ model, messages, tools, stream: true })) {
    answer.content += part.message.content;
    answer.tool_calls.push(...(part.message.tool_calls ?? []));
    last = part;
  }
  assert.equal(last.done, true);
  assert.ok(last.prompt_eval_count > 0 && last.eval_count > 0);
  messages.push(answer);
  if (!answer.tool_calls.length) {
    console.log(answer.content);
    break;
  }
  for (const call of answer.tool_calls) {
    const { name, arguments: given } = call.function;
    messages.push({ role: "tool", tool_name: name, content: run[name](given) });
  }
}

const listed = await client.list();
assert.ok(listed.models.some((one) => one.name.startsWith(model)));
assert.ok((await client.show({ model })).capabilities.includes("completion"));
assert.ok((await client.ps()).models.some((one) => one.name.startsWith(model)));
assert.ok((await client.version()).version);
const whole = await client.generate({ model, prompt: "Hello", options: { num_predict: 4 } });
assert.equal(whole.done, true);
const { embeddings } = await client.embed({ model: embedder, input: ["one", "two"] });
assert.equal(embeddings.length, 2);
const endless = await client.generate({ model, prompt, stream: true, raw: true });
setTimeout(() => endless.abort(), 50);
await assert.rejects(async () => {
  for await (const part of endless) if (part.done) throw new Error("ended by itself");
}, /abort|ended by itself/i);
await assert.rejects(client.chat({ model: "no-such-model", messages }), /no-such-model/);
