// What every Node client is asked to do, and how its script reports it; the same as in tests/clients/features.py.

import { writeFileSync } from "node:fs";
import { z } from "zod";

export const QUESTION = "What is the capital of France?";
export const TOO_LONG = "word ".repeat(3000);
export const ADAPTERS = ["json", "pirate", "sql"];
export const CITIES = ["Paris", "London"];

export const City = z.object({ city: z.enum(CITIES), is_capital: z.boolean() });

export const WEATHER_TOOL = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: CITIES } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

export function toolCallText(city) {
  const call = JSON.stringify({ name: "get_weather", arguments: { city } });
  return `<tool_call>\n${call}\n</tool_call>`;
}

export async function run(features) {
  const world = JSON.parse(process.argv[2]);
  const problems = {};
  for (const [name, feature] of Object.entries(features)) {
    try {
      await feature(world);
      problems[name] = null;
    } catch (error) {
      problems[name] = String(error?.stack ?? error);
    }
  }
  writeFileSync(process.argv[3], JSON.stringify(problems));
}
