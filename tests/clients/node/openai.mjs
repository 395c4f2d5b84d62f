// The official `openai` client of Node.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";

import { ADAPTERS, CITIES, City, QUESTION, TOO_LONG, WEATHER_TOOL, run, toolCallText } from "./features.mjs";

const ASKED = { messages: [{ role: "user", content: QUESTION }], temperature: 0, max_tokens: 16 };

const real = (world, key = world.key) => new OpenAI({ baseURL: world.real_url, apiKey: key, maxRetries: 0 });
const echo = (world) => new OpenAI({ baseURL: world.echo_url, apiKey: world.key, maxRetries: 0 });
const cities = (calls) => calls.map((call) => JSON.parse(call.function.arguments).city);

await run({
  async model_list(world) {
    const names = [];
    for await (const card of real(world).models.list()) names.push(card.id);
    assert.deepEqual(names, ["smollm2", ...ADAPTERS]);
    assert.equal((await real(world).models.retrieve("sql")).id, "sql");
  },

  async plain(world) {
    const answer = await real(world).chat.completions.create({ model: "smollm2", ...ASKED });
    assert.match(answer.choices[0].message.content, /Paris/);
    assert.ok(answer.usage.completion_tokens > 0);
  },

  async streaming(world) {
    const whole = await real(world).chat.completions.create({ model: "smollm2", ...ASKED });
    const stream = await real(world).chat.completions.create({
      model: "smollm2",
      stream: true,
      stream_options: { include_usage: true },
      ...ASKED,
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(usage.total_tokens, whole.usage.total_tokens);
  },

  async stream_helper(world) {
    const stream = real(world).chat.completions.stream({ model: "smollm2", ...ASKED });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
  },

  async adapter_by_name(world) {
    const answer = await real(world).chat.completions.create({ model: "json", ...ASKED, max_tokens: 48 });
    assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ["answer", "confidence"]);
  },

  async tool_call(world) {
    const messages = [{ role: "user", content: toolCallText("Paris") + toolCallText("London") }];
    const answer = await echo(world).chat.completions.create({ model: "echo", messages, tools: [WEATHER_TOOL] });
    const [choice] = answer.choices;
    assert.deepEqual(cities(choice.message.tool_calls), ["Paris", "London"]);
    assert.equal(choice.finish_reason, "tool_calls");
    messages.push(choice.message);
    for (const call of choice.message.tool_calls) {
      messages.push({ role: "tool", tool_call_id: call.id, content: "22 C" });
    }
    const next = await echo(world).chat.completions.create({ model: "echo", messages, tools: [WEATHER_TOOL] });
    assert.equal(next.choices[0].message.content, "22 C");
  },

  async streamed_tool_call(world) {
    const text = "Let me look. " + toolCallText("Paris") + toolCallText("London");
    const stream = echo(world).chat.completions.stream({
      model: "echo",
      messages: [{ role: "user", content: text }],
      tools: [WEATHER_TOOL],
    });
    const [choice] = (await stream.finalChatCompletion()).choices;
    assert.deepEqual(cities(choice.message.tool_calls), ["Paris", "London"]);
    assert.deepEqual(choice.message.tool_calls.map((call) => call.function.name), ["get_weather", "get_weather"]);
    assert.equal(choice.finish_reason, "tool_calls");
  },

  async required_tool(world) {
    const answer = await real(world).chat.completions.create({
      model: "smollm2",
      tools: [WEATHER_TOOL],
      tool_choice: "required",
      ...ASKED,
      max_tokens: 128,
    });
    assert.ok(CITIES.includes(cities(answer.choices[0].message.tool_calls)[0]));
  },

  async named_tool(world) {
    const answer = await real(world).chat.completions.create({
      model: "smollm2",
      tools: [WEATHER_TOOL],
      tool_choice: { type: "function", function: { name: "get_weather" } },
      ...ASKED,
      max_tokens: 128,
    });
    assert.ok(CITIES.includes(cities(answer.choices[0].message.tool_calls)[0]));
  },

  async structured_output(world) {
    const answer = await real(world).chat.completions.parse({
      model: "smollm2",
      response_format: zodResponseFormat(City, "city"),
      ...ASKED,
      max_tokens: 64,
    });
    assert.ok(CITIES.includes(answer.choices[0].message.parsed.city));
  },

  async bad_key(world) {
    const asked = real(world, "wrong").chat.completions.create({ model: "smollm2", ...ASKED });
    await assert.rejects(asked, (error) => {
      assert.ok(error instanceof OpenAI.AuthenticationError);
      assert.equal(error.code, "invalid_api_key");
      return true;
    });
  },

  async unknown_model(world) {
    const asked = real(world).chat.completions.create({ model: "nobody", ...ASKED });
    await assert.rejects(asked, (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.equal(error.code, "model_not_found");
      return true;
    });
  },

  async context_overflow(world) {
    const messages = [{ role: "user", content: TOO_LONG }];
    await assert.rejects(real(world).chat.completions.create({ model: "smollm2", messages }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.code, "context_length_exceeded");
      return true;
    });
  },
});
