// Tokens a second of llama.cpp: node llama_cpp.mjs FILE.gguf STREAMS TOKENS PROMPT, in a folder
// where node-llama-cpp is installed. Two rounds, of which the second counts.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const from = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(from.resolve("node-llama-cpp")).href);
const [file, streams, tokens, prompt] = process.argv.slice(2);
const count = Number(streams);
const llama = await getLlama({gpu: false, maxThreads: 2, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({sequences: count, contextSize: 1024, threads: 2});
const sequences = Array.from({length: count}, () => context.getSequence());
const asked = model.tokenize(prompt);
let speed = 0;
for (let round = 0; round < 2; round++) {
    let begun = 0, since = null, made = 0;
    await Promise.all(sequences.map(async (sequence) => {
        await sequence.clearHistory();
        let own = 0;
        for await (const _ of sequence.evaluate(asked, {temperature: 0, yieldEogToken: true})) {
            own++;
            if (own === 1 && ++begun === count) since = performance.now();
            else if (since !== null) made++;
            if (own >= Number(tokens)) break;
        }
    }));
    speed = made / (performance.now() - since) * 1000;
}
console.log(speed);
process.exit(0);
