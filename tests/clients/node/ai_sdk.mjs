// The AI SDK (`ai`) with its provider for servers of this kind, `@ai-sdk/openai-compatible`.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { ADAPTERS, CITIES, City, QUESTION, TOO_LONG, run, toolCallText } from "./features.mjs";

const provider = (baseURL, apiKey) =>
  createOpenAICompatible({
    name: "loramux",
    baseURL,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const real = (world, model = "smollm2", key = world.key) => provider(world.real_url, key)(model);
const echo = (world) => provider(world.echo_url, world.key)("echo");
const ASKED = { prompt: QUESTION, temperature: 0, maxOutputTokens: 16, maxRetries: 0 };

function weather(asked) {
  return {
    get_weather: tool({
      description: "The weather in a city.",
      inputSchema: z.object({ city: z.enum(CITIES) }),
      execute: async ({ city }) => {
        asked.push(city);
        return "22 C";
      },
    }),
  };
}

async function refused(asked, status, words) {
  await assert.rejects(asked, (error) => {
    assert.ok(APICallError.isInstance(error), String(error));
    assert.equal(error.statusCode, status);
    assert.match(error.message, words);
    return true;
  });
}

await run({
  async model_list(world) {
    // The SDK has no list; pages that use it read the route by themselves.
    const headers = { authorization: `Bearer ${world.key}` };
    const list = await (await fetch(`${world.real_url}/models`, { headers })).json();
    assert.deepEqual(list.data.map((card) => card.id), ["smollm2", ...ADAPTERS]);
  },

  async plain(world) {
    const answer = await generateText({ model: real(world), ...ASKED });
    assert.match(answer.text, /Paris/);
    assert.ok(answer.usage.outputTokens > 0);
  },

  async streaming(world) {
    const whole = await generateText({ model: real(world), ...ASKED });
    const stream = streamText({ model: real(world), ...ASKED });
    let text = "";
    for await (const delta of stream.textStream) text += delta;
    assert.equal(text, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
    assert.equal(await stream.finishReason, whole.finishReason);
  },

  async adapter_by_name(world) {
    const answer = await generateText({ model: real(world, "json"), ...ASKED, maxOutputTokens: 48 });
    assert.deepEqual(Object.keys(JSON.parse(answer.text)).sort(), ["answer", "confidence"]);
  },

  async tool_call(world) {
    const asked = [];
    const answer = await generateText({
      model: echo(world),
      prompt: toolCallText("Paris"),
      tools: weather(asked),
      stopWhen: stepCountIs(2),
      maxRetries: 0,
    });
    assert.deepEqual(asked, ["Paris"]);
    assert.match(answer.text, /22 C/);
  },

  async streamed_tool_call(world) {
    const asked = [];
    const stream = streamText({
      model: echo(world),
      prompt: toolCallText("Paris") + toolCallText("London"),
      tools: weather(asked),
      stopWhen: stepCountIs(2),
      maxRetries: 0,
    });
    await stream.consumeStream({ onError: (error) => { throw error; } });
    assert.deepEqual(asked.sort(), ["London", "Paris"]);
    assert.match(await stream.text, /22 C/);
  },

  async required_tool(world) {
    const asked = [];
    await generateText({
      model: real(world),
      ...ASKED,
      maxOutputTokens: 128,
      tools: weather(asked),
      toolChoice: "required",
    });
    assert.ok(asked.length > 0 && CITIES.includes(asked[0]));
  },

  async named_tool(world) {
    const asked = [];
    await generateText({
      model: real(world),
      ...ASKED,
      maxOutputTokens: 128,
      tools: weather(asked),
      toolChoice: { type: "tool", toolName: "get_weather" },
    });
    assert.ok(asked.length > 0 && CITIES.includes(asked[0]));
  },

  async structured_output(world) {
    const answer = await generateText({
      model: real(world),
      ...ASKED,
      maxOutputTokens: 64,
      output: Output.object({ schema: City }),
    });
    assert.ok(CITIES.includes(answer.output.city));
  },

  async bad_key(world) {
    await refused(generateText({ model: real(world, "smollm2", "wrong"), ...ASKED }), 401, /Incorrect API key/);
  },

  async unknown_model(world) {
    await refused(generateText({ model: real(world, "nobody"), ...ASKED }), 404, /does not exist/);
  },

  async context_overflow(world) {
    const asked = generateText({ model: real(world), ...ASKED, prompt: TOO_LONG });
    await refused(asked, 400, /maximum context length is 1024 tokens/);
  },
});
