// MODEL URL openai|anthropic|responses PROMPT: the Vercel AI SDK's loop of steps.
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(process.env.PACKAGES + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { stepCountIs, streamText, tool } = await load("ai");
const { z } = await load("zod");

const [name, url, provider, prompt] = process.argv.slice(2);
const baseURL = `${url}/v1`;
const apiKey = "unused";
const models = {
  openai: async () =>
    (await load("@ai-sdk/openai-compatible")).createOpenAICompatible({
      name: "mlx-server", baseURL, apiKey, includeUsage: true,
    })(name),
  anthropic: async () =>
    (await load("@ai-sdk/anthropic")).createAnthropic({ baseURL, apiKey })(name),
  responses: async () =>
    (await load("@ai-sdk/openai")).createOpenAI({ baseURL, apiKey }).responses(name),
};
const tools = {
  read_file: tool({
    description: "Read a file.",
    inputSchema: z.object({ path: z.string() }),
    execute: ({ path }) => readFileSync(path, "utf8"),
  }),
  edit_file: tool({
    description: "Replace a text in a file.",
    inputSchema: z.object({ path: z.string(), old: z.string(), new: z.string() }),
    execute: (change) => {
      const text = readFileSync(change.path, "utf8");
      writeFileSync(change.path, text.replace(change.old, change.new));
      return "edited";
    },
  }),
  run_command: tool({
    description: "Run a command and write what it prints to a file.",
    inputSchema: z.object({ command: z.array(z.string()), output: z.string() }),
    execute: ({ command, output }) => {
      const said = execFileSync(command[0], command.slice(1), { encoding: "utf8" });
      writeFileSync(output, said);
      return said;
    },
  }),
};
const result = streamText({
  model: await models[provider](),
  tools,
  prompt,
  stopWhen: stepCountIs(10),
  onError: ({ error }) => {
    console.error(error);
    process.exit(1);
  },
});
for await (const piece of result.textStream) process.stdout.write(piece);
const usage = await result.totalUsage;
if (!(usage.inputTokens > 0)) throw new Error(`no usage: ${JSON.stringify(usage)}`);
